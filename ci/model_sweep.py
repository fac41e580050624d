"""Compare every decoder of transformers, shrunk and with random weights, through PortaLM.

python ci/model_sweep.py check              all classes, and the configs in ci/model_configs; exit
                                            status 1 for a wrong answer, a crash, or an out-of-date
                                            table in docs/models.md
python ci/model_sweep.py write              all, and write the table
python ci/model_sweep.py NAME...            these classes, for example LlamaForCausalLM
python ci/model_sweep.py --configs FOLDER   the config.json values in FOLDER/*.json

Each model is saved, loaded by an engine on the reference backend in float32, and must give the
tokens and prompt logprobs of transformers' eager forward: for prompts in one batch computed in
chunks, for the same prompts again with prefix hits, and for one alone.
"""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import re
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from portalm.config import EngineConfig
from portalm.engine.engine import Engine
from portalm.engine.messages import AddRequest, TokenOutput
from portalm.errors import PortaLMError
from portalm.models.registry import ARCHITECTURES
from portalm.models.registry import model_class as find_class
from portalm.models.small_config import randomize, shrink
from portalm.models.text_part import MULTIMODAL
from portalm.sampling_params import SamplingParams

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
CONFIGS = ROOT / "ci" / "model_configs"
"""Values of published config.json files."""
BEGIN, END = "<!-- begin: ci/model_sweep.py write -->", "<!-- end: ci/model_sweep.py write -->"

PROMPTS = {str(n): [(7 * n + i * i) % 120 for i in range(n)] for n in (1, 17, 50)}
NUM_OUT = 16
_MAX_ERROR = 1e-6
"""Largest relative squared error of a prompt's logprobs; correct models have at most 1e-9."""

OVERRIDES: dict[str, dict[str, Any]] = {
    "CohereCompassForCausalLM": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "CsmDepthDecoderForCausalLM": {"max_position_embeddings": 4096},
    "DbrxForCausalLM": {"attn_config": {"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 1e4}},
    "DeepseekV2ForCausalLM": {"num_experts_per_tok": 3},
    "DiffLlamaForCausalLM": {"head_dim": 16},
    "Dots1ForCausalLM": {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 1},
    "GraniteMoeHybridForCausalLM": {
        "layer_types": ["attention"] * 4,
        "mamba_d_head": 32,
        "mamba_n_heads": 4,
    },
    "HunYuanDenseV1ForCausalLM": {"head_dim": 16},
    "HunYuanMoEV1ForCausalLM": {"head_dim": 16},
    "MinistralForCausalLM": {"head_dim": 16},
    "NemotronForCausalLM": {"num_key_value_heads": 2},
}
"""Values of config classes whose defaults alone make no model."""

Status = Literal["match", "refused", "wrong", "crashed", "not built"]
FAILURES = ("wrong", "crashed")


@dataclass(frozen=True)
class Result:
    """The result of one architecture."""

    name: str
    status: Status
    detail: str = ""
    """The reason of a refusal, or what was wrong; for a match, the code that runs the model."""


def architectures() -> list[str]:
    """Decoder classes of transformers, and others of it that PortaLM has a family for."""
    import transformers

    names = {n for n in dir(transformers) if n.endswith("ForCausalLM") and not n.startswith("Auto")}
    return sorted(names | {n for n in ARCHITECTURES if n.endswith("LMHeadModel")})


def sweep(name: str, values: Mapping[str, Any] | None = None) -> Result:
    """Compare one architecture; `values` are those of a config.json, or None for its defaults."""
    import transformers

    model_class = getattr(transformers, name, None)
    if model_class is None:
        return Result(name, "not built", "transformers has no such class")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        try:
            model = _make(model_class, name, values)
            model.save_pretrained(path)
            if values is not None:
                small = _small_values(model_class.config_class, values)
                (path / "config.json").write_text(json.dumps(small))
        except Exception as error:  # transformers' code can raise anything
            return _refused_by_name(name, model_class) or Result(
                name, "not built", _first_line(error)
            )
        try:
            engine = Engine(
                EngineConfig.from_dict(
                    {
                        "model": folder,
                        "device": "reference",
                        "dtype": "float32",
                        "max_model_len": 128,
                        "max_num_seqs": 4,
                        "max_num_batched_tokens": 24,
                    }
                )
            )
            problem = _compare(engine, model)
        except PortaLMError as error:
            return Result(name, "refused", _reason(error))
        except Exception as error:
            return Result(name, "crashed", f"{type(error).__name__}: {_first_line(error)}")
    if problem:
        return Result(name, "wrong", problem)
    is_own = name in ARCHITECTURES or name in MULTIMODAL
    return Result(name, "match", "own" if is_own else "transformers")


def _refused_by_name(name: str, model_class: Any) -> Result | None:
    """A refusal for which PortaLM needs no model; None if there is none."""
    try:
        found = find_class(name)
        if name not in ARCHITECTURES:
            found.complete({**model_class.config_class().to_dict(), "architectures": [name]})
    except PortaLMError as error:
        return Result(name, "refused", _reason(error))
    except Exception:
        return None
    return None


def _make(model_class: Any, name: str, values: Mapping[str, Any] | None) -> Any:
    """Create a small model with random weights."""
    config_class = model_class.config_class
    if values is None:
        small = {**shrink(config_class().to_dict()), **OVERRIDES.get(name, {})}
    else:
        small = _small_values(config_class, values)
    torch.manual_seed(0)
    model = model_class._from_config(
        config_class.from_dict(small), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    randomize(model)
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPTS["17"]])).logits
    if not torch.isfinite(logits).all():
        raise ValueError("its logits are not finite")
    return model


def _small_values(config_class: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Shrink the values of a config.json, under the keys that it has.

    Keys that it leaves out stay out, except sizes whose defaults are large.
    """
    full = config_class.from_dict(dict(values)).to_dict()
    small = shrink(full)
    result = {key: small.get(key, value) for key, value in values.items()}
    if result.get("rope_scaling"):
        result["rope_scaling"] = shrink({"rope_parameters": values["rope_scaling"]})[
            "rope_parameters"
        ]
    sizes = {k: v for k, v in small.items() if isinstance(v, int) and v != full[k]}
    return {**sizes, **result}


def _compare(engine: Engine, model: Any) -> str:
    """Answer the prompts in three ways; return what differs from transformers, or nothing."""
    batch = _answers(engine, PROMPTS, prompt_logprobs=0)
    again = _answers(engine, PROMPTS)
    alone = _answers(engine, {"50": PROMPTS["50"]})
    num_wrong, worst = 0, 0.0
    for key, prompt in PROMPTS.items():
        for outputs in (batch[key], again[key], *([alone[key]] if key in alone else [])):
            tokens = [token for output in outputs for token in output.token_ids]
            with torch.inference_mode():
                logits = model(torch.tensor([prompt + tokens])).logits[0].double()
            right = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
            num_wrong += sum(a != b for a, b in zip(tokens, right, strict=True))
            logprobs = [e.logprob for output in outputs for e in output.prompt_logprobs or []]
            if logprobs:
                expected = logits.log_softmax(-1)[torch.arange(len(prompt) - 1), prompt[1:]]
                difference = torch.tensor(logprobs, dtype=torch.float64) - expected
                worst = max(worst, float(difference.square().sum() / expected.square().sum()))
    if engine.stats().prefix_hits_total == 0:
        return "no prefix hit"
    if num_wrong:
        return f"{num_wrong} of {NUM_OUT * (2 * len(PROMPTS) + 1)} tokens"
    return "" if worst <= _MAX_ERROR else f"relative squared error of prompt logprobs {worst:.0e}"


def _answers(
    engine: Engine, prompts: Mapping[str, Sequence[int]], **params: Any
) -> dict[str, list[TokenOutput]]:
    settings = {"temperature": 0.0, "max_tokens": NUM_OUT, "ignore_eos": True, **params}
    for key, prompt in prompts.items():
        engine.add(
            AddRequest(
                request_id=key,
                prompt_token_ids=list(prompt),
                params=SamplingParams(**settings),
                seed=0,
            )
        )
    outputs: dict[str, list[TokenOutput]] = {key: [] for key in prompts}
    while engine.has_work():
        for output in engine.step().outputs:
            outputs[output.request_id].append(output)
    return outputs


def _reason(error: PortaLMError) -> str:
    """The part of a refusal's text that says why, without what differs by the model's name."""
    text = str(error).split("cannot run here because ")[-1].split("is not supported: ")[-1]
    return _first_line(text)


def _first_line(error: object) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


# -- the table --------------------------------------------------------------------------------


def table(results: Sequence[Result]) -> Iterator[str]:
    """The section of docs/models.md: how many models have each result, and which."""
    import transformers

    matches = [r for r in results if r.status == "match"]
    yield (
        f"Of the {len(results)} decoder classes of transformers {transformers.__version__}, "
        f"{len(matches)} match, {_count(results, 'refused')} are refused and "
        f"{_count(results, 'wrong')} are wrong. Each was shrunk, filled with random weights and "
        f"compared in float32 with transformers: in a batch, with prefix hits, and alone. Names "
        f"are those of classes without `ForCausalLM`."
    )
    own = [r for r in matches if r.detail == "own"]
    code = [r for r in matches if r.detail == "transformers"]
    yield f"**Match, with a family of PortaLM** ({len(own)}): {_names(own)}."
    yield f"**Match, through transformers' code** ({len(code)}): {_names(code)}."
    for status in ("wrong", "crashed", "refused", "not built"):
        found = [r for r in results if r.status == status]
        by_reason: dict[str, list[Result]] = {}
        for result in found:
            by_reason.setdefault(_general(result.detail), []).append(result)
        for reason, some in sorted(by_reason.items(), key=lambda item: -len(item[1])):
            yield f"**{status.capitalize()}**, {reason} ({len(some)}): {_names(some)}."


def _general(reason: str) -> str:
    """A reason without numbers of layers and texts of exceptions, to count equal ones together."""
    raised = re.match(r"(\w+(?:Error|Exception)): ", reason)
    if raised:
        return f"its code raises {raised[1]} in a run without data"
    return re.sub(r"layer \d+", "a layer", reason)


def _count(results: Sequence[Result], status: Status) -> int:
    return sum(result.status == status for result in results)


def _names(results: Sequence[Result]) -> str:
    return ", ".join(result.name.removesuffix("ForCausalLM") for result in results)


def page_with(results: Sequence[Result]) -> str:
    """docs/models.md with the table of these results."""
    text = PAGE.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    parts = [textwrap.fill(p, 110, break_long_words=False) for p in table(results)]
    return f"{before}{BEGIN}\n\n" + "\n\n".join(parts) + f"\n\n{END}{after}"


# -- the command ------------------------------------------------------------------------------


def main() -> int:
    """Run the sweep; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", help="check, write, or names of classes")
    parser.add_argument("--configs", type=Path, help="folder of config.json values, as NAME.json")
    arguments = parser.parse_args()
    _silence()
    if not arguments.names and arguments.configs is None:
        parser.error("pass check, write, names of classes, or --configs FOLDER")
    is_all = arguments.names[:1] in (["check"], ["write"])
    results = [_timed(name) for name in (architectures() if is_all else arguments.names)]
    folder = CONFIGS if is_all else arguments.configs
    published = [] if folder is None else [_timed(**job) for job in _configs(folder)]
    failed = [r.name for r in (*results, *published) if r.status in FAILURES]
    if failed:
        print(f"wrong or crashed: {', '.join(failed)}")
    if is_all:
        new, old = page_with(results), PAGE.read_text()
        if arguments.names[0] == "write":
            PAGE.write_text(new)
        elif new != old:
            print(*difflib.unified_diff(old.splitlines(), new.splitlines(), lineterm=""), sep="\n")
            print("docs/models.md is out of date: run `python ci/model_sweep.py write`")
            return 1
    return 1 if failed else 0


def _configs(folder: Path) -> Iterator[dict[str, Any]]:
    """Arguments of `_timed` for each config.json in `folder`."""
    for path in sorted(folder.glob("*.json")):
        values = json.loads(path.read_text())
        yield {"name": values["architectures"][0], "values": values, "label": path.stem}


def _timed(name: str, values: Mapping[str, Any] | None = None, label: str | None = None) -> Result:
    """Compare one architecture, and print the result."""
    started = time.perf_counter()
    result = sweep(name, values)
    seconds = time.perf_counter() - started
    print(f"{seconds:5.1f} s  {label or name:36} {result.status:9} {result.detail}", flush=True)
    return result


def _silence() -> None:
    import transformers

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)


if __name__ == "__main__":
    sys.exit(main())
