"""`portalm bench`: one file per benchmark."""
