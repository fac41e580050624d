"""Between text and token ids: tokenizer, detokeniser, chat templates, stop strings."""
