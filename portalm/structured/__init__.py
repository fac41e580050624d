"""Answers that match a JSON schema, a regex, a choice or a grammar, by XGrammar.

compiler (the client's side) has compiler_process compile what was asked; grammar (the engine's
side) turns the result into masks of the tokens that may come next.
"""
