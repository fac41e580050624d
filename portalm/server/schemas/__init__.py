"""Request bodies as pydantic models, and the checked values made from them."""
