"""`portalm chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from portalm.cli.engine_flags import add_engine_flags

if TYPE_CHECKING:
    from portalm.cli.chat_partners import Partner

_HELP = '''\
/help            this
/clear           forget the conversation
/system TEXT     set the system message; without TEXT show it; /system - removes it
/save FILE       write the conversation to FILE, as JSON
/exit            end (also Ctrl-D)
Ctrl-C ends an answer. Several lines: end each but the last with \\, or put """ around them.'''


def add_chat(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`portalm chat`: talk to a model, in this process or behind a server."""
    parser = commands.add_parser("chat", help="talk to a model in the terminal")
    parser.add_argument("--url", default=None, help="of a running server, instead of loading here")
    parser.add_argument("--api-key", default=None, help="for --url: sent as a bearer token")
    parser.add_argument("--system", default=None, help="the system message")
    parser.add_argument("--max-tokens", type=int, default=512, help="most tokens of an answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    add_engine_flags(parser)
    parser.set_defaults(run=run_chat)


def run_chat(arguments: argparse.Namespace) -> int:
    """Read messages, stream answers, until the input ends; 1 if one could not be answered."""
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
            raise ConfigError("--api-key is for --url: a model in this process asks for none")
        from portalm.llm import LLM

        return LocalModel(LLM(**settings), **answers)
    model = settings.pop("model", None)
    if settings:
        raise ConfigError(
            f"{', '.join(sorted(settings))}: with --url the server has settled that; "
            f"give it to `portalm serve`"
        )
    return RemoteModel(arguments.url, model=model, api_key=arguments.api_key, **answers)


class Chat:
    """A conversation: what was said, and the commands about it."""

    def __init__(self, partner: Partner, *, system: str | None, is_terminal: bool) -> None:
        """Nothing is said yet.

        Args:
            partner: who answers.
            system: the system message.
            is_terminal: a person types; else there are no prompts and no figures.
        """
        self._partner = partner
        self._system = system
        self._is_terminal = is_terminal
        self._said: list[dict[str, str]] = []
        self._status = 0
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: print(_HELP),
            "/clear": lambda _: self._said.clear(),
            "/system": self._set_system,
            "/save": self._save,
        }

    def run(self) -> int:
        """Read and answer until the input ends; the exit status."""
        import contextlib

        if self._is_terminal:
            with contextlib.suppress(ImportError):  # lines can be edited and called back
                import readline

                # pasted lines are one message
                readline.parse_and_bind("set enable-bracketed-paste on")
            print(f"{self._partner.name}. /help says what else there is.")
        while True:
            try:
                if not self._obey(read_message(self._ask).strip()):
                    return self._status
            except EOFError:
                if self._is_terminal:
                    print()
                return self._status
            except KeyboardInterrupt:
                print("\nCtrl-D or /exit ends the conversation")

    def _obey(self, message: str) -> bool:
        """Do what a command says, or answer; False: that was the end."""
        command, _, rest = message.partition(" ")
        if command in ("/exit", "/quit"):
            return False
        if command in self._commands:
            self._commands[command](rest.strip())
        elif command.startswith("/") and "\n" not in message:
            self._complain(f"no command {command}: /help lists them")
        elif message:
            self._answer(message)
        return True

    def _ask(self, prompt: str) -> str:
        return input(prompt if self._is_terminal else "")

    def _messages(self) -> list[dict[str, str]]:
        opening = [{"role": "system", "content": self._system}] if self._system else []
        return [*opening, *self._said]

    def _answer(self, message: str) -> None:
        import contextlib
        import time

        from portalm.errors import PortaLMError

        self._said.append({"role": "user", "content": message})
        text, end, num_tokens = "", None, 0
        asked = first = last = time.perf_counter()
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
            self._complain(str(error))
        except KeyboardInterrupt:
            end = "stopped"
            print()
        if not text:
            self._said.pop()  # a question without an answer is not part of the conversation
            return
        self._said.append({"role": "assistant", "content": text})
        if self._is_terminal:
            rate = (num_tokens - num_first) / (last - first) if last > first else 0.0
            note = {"length": ", cut: --max-tokens or the context is full", "stopped": ", stopped"}
            print(
                f"[{num_tokens} tokens, {rate:.1f} tokens/s, first after "
                f"{(first - asked) * 1000:.0f} ms{note.get(end or '', '')}]"
            )

    def _set_system(self, text: str) -> None:
        if text:
            self._system = None if text == "-" else text
        print(f"system message: {self._system or 'none'}")

    def _save(self, name: str) -> None:
        import json
        from pathlib import Path

        if not name:
            self._complain("/save needs the name of a file")
            return
        try:
            Path(name).expanduser().write_text(
                json.dumps(self._messages(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
        except OSError as error:
            self._complain(f"{name} cannot be written: {error.strerror}")
            return
        print(f"{len(self._messages())} messages in {name}")

    def _complain(self, text: str) -> None:
        import sys

        self._status = 0 if self._is_terminal else 1
        print(f"portalm: {text}", file=sys.stderr)


def read_message(ask: Callable[[str], str]) -> str:
    r"""One message: a line, several that end with \, or all between two \"""\""".

    Args:
        ask: reads one line, shown a prompt; raises EOFError at the end.
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
