"""`portalm chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse

from portalm.cli.engine_flags import add_engine_flags

_HELP = "/clear forgets the conversation, /exit (or Ctrl-D) ends it, /help shows this"


def add_chat(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`portalm chat`: talk to a model, in this process."""
    parser = commands.add_parser("chat", help="talk to a model in the terminal")
    parser.add_argument("--system", default=None, help="the system message")
    parser.add_argument("--max-tokens", type=int, default=512, help="most tokens of an answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    add_engine_flags(parser)
    parser.set_defaults(run=run_chat)


def run_chat(arguments: argparse.Namespace) -> int:
    """Read lines, stream answers, until the input ends."""
    import sys

    from portalm.cli.engine_flags import engine_settings
    from portalm.errors import InvalidRequest
    from portalm.llm import LLM
    from portalm.sampling_params import SamplingParams

    params = SamplingParams(max_tokens=arguments.max_tokens, temperature=arguments.temperature)
    llm = LLM(**engine_settings(arguments))
    opening = [{"role": "system", "content": arguments.system}] if arguments.system else []
    messages = list(opening)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print(f"{llm.engine.ready.model} on {llm.engine.ready.device}. {_HELP}")
    while True:
        try:
            line = input("> " if is_terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if line in ("/exit", "/quit"):
            return 0
        if line == "/help":
            print(_HELP)
        elif line == "/clear":
            messages = list(opening)
        elif line:
            messages.append({"role": "user", "content": line})
            answer = ""
            try:
                prompt = llm.get_tokenizer().apply_chat_template(messages)
                for delta in llm.stream(prompt, params):
                    answer += delta.text
                    print(delta.text, end="", flush=True)
            except InvalidRequest as error:
                print(f"portalm: {error}", file=sys.stderr)
                messages.pop()
                continue
            except KeyboardInterrupt:
                pass  # what was said so far stays in the conversation
            print()
            messages.append({"role": "assistant", "content": answer})
