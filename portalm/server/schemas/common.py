"""Limits and field types that several request bodies share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

MAX_ANSWERS = 4096
"""Maximum number of answers in one request: prompts times n."""

MAX_PROMPT = 1 << 20
"""Maximum number of token ids in one prompt, for any model; checked while parsing."""

Messages = Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=4096)]
TokenIds = Annotated[list[int], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]
StopText = Annotated[str, Field(max_length=1024)]
"""Parsing of these lists stops at the first invalid item: a body may have millions."""
