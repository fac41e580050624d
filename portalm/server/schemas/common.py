"""Limits and field types that several request bodies share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

MAX_ANSWERS = 4096
"""Of one request: prompts times n."""

MAX_PROMPT = 1 << 20
"""Token ids of one prompt, whatever the model: longer ones are not looked at."""

Messages = Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=4096)]
TokenIds = Annotated[list[int], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]
StopText = Annotated[str, Field(max_length=1024)]
"""Lists stop at their first wrong item: a body may hold millions of them."""
