"""`portalm chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from portalm.cli.engine_flags import add_engine_flags

if TYPE_CHECKING:
    from portalm.cli.chat_partners import Partner

_HELP = '''\
/help            show this text
/clear           clear the conversation
/system TEXT     set the system message; without TEXT show it; /system - removes it
/save FILE       save the conversation to FILE as JSON
/exit            quit (also Ctrl-D)
Ctrl-C stops an answer. Several lines: end each except the last with \\, or put """ around them.'''


def add_chat(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `portalm chat`: chat with a model in this process or on a server."""
    parser = commands.add_parser("chat", help="chat with a model in the terminal")
    parser.add_argument(
        "--url",
        default=None,
        help="URL of a running server to use (default: load the model in this process)",
    )
    parser.add_argument("--api-key", default=None, help="API key to send to --url (default: none)")
    parser.add_argument("--system", default=None, help="system message (default: none)")
    parser.add_argument("--max-tokens", type=int, default=512, help="maximum tokens per answer")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="sampling temperature; 0 is greedy"
    )
    add_engine_flags(parser)
    parser.set_defaults(run=run_chat)


def run_chat(arguments: argparse.Namespace) -> int:
    """Read messages and stream answers until the input ends; return 1 if an answer failed."""
    import sys

    partner = _partner(arguments)
    chat = Chat(partner, system=arguments.system, is_terminal=sys.stdin.isatty())
    return chat.run()


def _partner(arguments: argparse.Namespace) -> Partner:
    from portalm.cli.chat_partners import LocalModel, RemoteModel
    from portalm.cli.engine_flags import engine_settings
    from portalm.errors import ConfigError

    settings = engine_settings(arguments)
    answers = {"max_tokens": arguments.max_tokens, "temperature": arguments.temperature}
    if arguments.url is None:
        if arguments.api_key is not None:
            raise ConfigError("--api-key needs --url: a model in this process uses no key")
        from portalm.llm import LLM

        return LocalModel(LLM(**settings), **answers)
    model = settings.pop("model", None)
    if settings:
        raise ConfigError(
            f"{', '.join(sorted(settings))} cannot be set with --url: these are settings of the "
            f"server, pass them to `portalm serve`"
        )
    return RemoteModel(arguments.url, model=model, api_key=arguments.api_key, **answers)


class Chat:
    """A conversation and its commands."""

    def __init__(self, partner: Partner, *, system: str | None, is_terminal: bool) -> None:
        """Start an empty conversation.

        Args:
            partner: the model that answers.
            system: system message; None: none.
            is_terminal: True: show prompts and speed; False: print answers only.
        """
        self._partner = partner
        self._system = system
        self._is_terminal = is_terminal
        self._history: list[dict[str, str]] = []
        self._status = 0
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: print(_HELP),
            "/clear": lambda _: self._history.clear(),
            "/system": self._set_system,
            "/save": self._save,
        }

    def run(self) -> int:
        """Read and answer until the input ends; return the exit status."""
        import contextlib

        if self._is_terminal:
            with contextlib.suppress(ImportError):  # line editing and history
                import readline

                # several pasted lines are one message
                readline.parse_and_bind("set enable-bracketed-paste on")
            print(f"{self._partner.name}. Type /help for commands.")
        while True:
            try:
                if not self._handle(read_message(self._ask).strip()):
                    return self._status
            except EOFError:
                if self._is_terminal:
                    print()
                return self._status
            except KeyboardInterrupt:
                print("\nCtrl-D or /exit ends the conversation")

    def _handle(self, message: str) -> bool:
        """Run a command, or answer a message; return False to quit."""
        command, _, rest = message.partition(" ")
        if command in ("/exit", "/quit"):
            return False
        if command in self._commands:
            self._commands[command](rest.strip())
        elif command.startswith("/") and "\n" not in message:
            self._print_error(f"unknown command {command}; /help lists all commands")
        elif message:
            self._answer(message)
        return True

    def _ask(self, prompt: str) -> str:
        return input(prompt if self._is_terminal else "")

    def _messages(self) -> list[dict[str, str]]:
        opening = [{"role": "system", "content": self._system}] if self._system else []
        return [*opening, *self._history]

    def _answer(self, message: str) -> None:
        import contextlib
        import time

        from portalm.errors import PortaLMError

        self._history.append({"role": "user", "content": message})
        text, end, num_tokens = "", None, 0
        sent = first = last = time.perf_counter()
        num_first = 0
        try:
            with contextlib.closing(self._partner.answer(self._messages())) as pieces:
                for piece in pieces:
                    end = piece.finish_reason or end
                    num_tokens = piece.num_tokens
                    if not piece.text:
                        continue
                    last = time.perf_counter()
                    if not text:
                        first, num_first = last, num_tokens
                    text += piece.text
                    print(piece.text, end="", flush=True)
            print()
        except PortaLMError as error:
            print(end="\n" if text else "")
            self._print_error(str(error))
        except KeyboardInterrupt:
            end = "stopped"
            print()
        if not text:
            self._history.pop()  # a question without an answer is not part of the conversation
            return
        self._history.append({"role": "assistant", "content": text})
        if self._is_terminal:
            rate = (num_tokens - num_first) / (last - first) if last > first else 0.0
            note = {"length": ", cut off by --max-tokens or the context", "stopped": ", stopped"}
            print(
                f"[{num_tokens} tokens, {rate:.1f} tokens/s, first token after "
                f"{(first - sent) * 1000:.0f} ms{note.get(end or '', '')}]"
            )

    def _set_system(self, text: str) -> None:
        if text:
            self._system = None if text == "-" else text
        print(f"system message: {self._system or 'none'}")

    def _save(self, name: str) -> None:
        import json
        from pathlib import Path

        if not name:
            self._print_error("/save needs a file name, for example /save chat.json")
            return
        try:
            Path(name).expanduser().write_text(
                json.dumps(self._messages(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
        except OSError as error:
            self._print_error(f"cannot write {name}: {error.strerror}")
            return
        print(f"saved {len(self._messages())} messages to {name}")

    def _print_error(self, text: str) -> None:
        import sys

        self._status = 0 if self._is_terminal else 1
        print(f"portalm: {text}", file=sys.stderr)


def read_message(ask: Callable[[str], str]) -> str:
    r"""Read one message: a line, lines that end with \, or all text between two \"""\""".

    Args:
        ask: reads one line after showing a prompt; raises EOFError at the end.
    """
    line = ask("> ")
    if line.lstrip().startswith('"""'):
        text = line.lstrip()[3:]
        while not text.rstrip().endswith('"""'):
            text += "\n" + ask(". ")
        return text.rstrip()[:-3].strip("\n")
    while line.endswith("\\"):
        line = line[:-1] + "\n" + ask(". ")
    return line
