"""Between text and token ids: tokenizer, detokeniser, chat templates, stop strings."""

from portalm.text.tokenizer import Tokenizer as Tokenizer
from portalm.text.tokenizer import load_tokenizer as load_tokenizer
