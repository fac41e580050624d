"""Structured outputs: answers that match a JSON schema, regex, choice or grammar, with XGrammar.

compiler (in the client's process) compiles grammars in compiler_process; grammar (in the engine's
process) turns a compiled grammar into masks of the tokens that may come next.
"""
