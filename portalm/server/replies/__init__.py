"""Replies: how answers are collected, shaped and streamed."""
