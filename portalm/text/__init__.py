"""Text to token ids and back: tokenizers, detokenizers, chat templates, stop strings, parsers."""

from portalm.text.loading import load_tokenizer as load_tokenizer
from portalm.text.tokenizer import Tokenizer as Tokenizer
