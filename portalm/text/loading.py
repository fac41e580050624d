"""Load a model's tokenizer, whatever its file format."""

from __future__ import annotations

from pathlib import Path

from portalm.errors import ConfigError, ModelNotFound
from portalm.text.chat_template import ChatTemplates
from portalm.text.tokenizer import Tokenizer

_OTHER_FILES = ("tokenizer_config.json", "tokenizer.model", "vocab.json", "tekken.json")
"""Files of tokenizers without a tokenizer.json, which transformers reads."""


def load_tokenizer(
    path: Path, *, chat_template: str | None = None, trust_remote_code: bool = False
) -> Tokenizer:
    """Load the tokenizer of a model.

    Args:
        path: a model folder or a .gguf file, as returned by `resolve_model`.
        chat_template: a Jinja template, or the path of one, to use instead of the model's.
        trust_remote_code: allow running Python code from the model folder.

    Raises:
        ModelNotFound: there is no tokenizer at `path`.
        CheckpointError: a tokenizer file is invalid.
        UnsupportedModel: the type of tokenizer is not supported.
        ConfigError: `chat_template` cannot be read or is not a valid Jinja template.
    """
    chosen = None
    if chat_template is not None:  # compiled now, so that an error shows at startup
        chosen = ChatTemplates({"default": _read_template(chat_template)}, compile_now=True)
    if path.is_file():
        from portalm.text.gguf_tokenizer import load_gguf_tokenizer

        return load_gguf_tokenizer(path, chosen)
    if (path / "tokenizer.json").is_file():
        from portalm.text.hf_tokenizer import load_fast_tokenizer

        return load_fast_tokenizer(path, chosen)
    if any((path / name).is_file() for name in _OTHER_FILES):
        from portalm.text.hf_tokenizer import load_slow_tokenizer

        return load_slow_tokenizer(path, chosen, trust_remote_code=trust_remote_code)
    raise ModelNotFound(
        f"no tokenizer in {str(path)!r}: it has neither tokenizer.json nor any of "
        f"{', '.join(_OTHER_FILES)}; name a folder or .gguf file that has one with --tokenizer"
    )


def _read_template(chosen: str) -> str:
    """Return `chosen` if it is a template (it has a brace or a newline), else read that file."""
    if "{" in chosen or "\n" in chosen:
        return chosen
    try:
        return Path(chosen).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"chat_template {chosen!r} is neither a Jinja template (it has no braces) nor a file "
            f"that can be read: {error}"
        ) from None
