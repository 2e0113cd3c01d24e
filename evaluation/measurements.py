"""The measurements: each runs something of ours beside its peers or its limits and reports what it found."""

import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from longllava.evaluation import workloads
from longllava.evaluation.measure import (
    Contest,
    Outcome,
    Report,
    budget,
    keep_nothing_freed,
    limits,
    machine,
    peak_memory,
    ratio,
    slope,
    timed,
    why,
)
from longllava.evaluation.pocket_tasks import COLOURS, QUESTIONS
from longllava.modeling_longllava import (
    LongLlavaCache,
    LongLlavaForConditionalGeneration,
    LongLlavaSession,
    selective_scan_backend,
)
from longllava.processing import LongLlavaProcessor

# arXiv 2409.02889, the table on efficiency: 100,000 tokens on one A800 of 80 GB; and the pictures that fit into 80 GB.
PAPER = {
    "9b": {
        "context": 100_000,
        "prefill_seconds": 16.5,
        "tokens_per_second": 62.1,
        "gigabytes": 38.7,
        "pictures": 1173,
    },
    "53b": {"context": 100_000, "prefill_seconds": 25.5, "tokens_per_second": 37.6, "gigabytes": 79.1},
}
QUESTION = "Which digit has the red frame?"
TAIL_PIECES = 2  # pieces of a prompt that are run on a full cache
TAIL_TOKENS = 8  # tokens that are decoded behind them
STATIC, STATIC_CONTEXT = "longllava static", 100_000  # above, the minutes of compiling are not worth it
SEARCH = 0.01  # how exactly the largest number of pictures is found


def measure_scan(
    device: torch.device,
    dtype: torch.dtype,
    channels: int,
    states: int,
    lengths: Sequence[int],
    train_lengths: Sequence[int],
    names: Sequence[str],
    repeats: int,
    limit: float,
    folder: Path | None,
) -> Report:
    """The selective scan alone, forward (`lengths`) and with its backward pass (`train_lengths`)."""
    report = Report(
        "scan",
        folder,
        machine(device, dtype),
        {"channels": channels, "states": states, "repeats": repeats},
        {
            "mode": "<s", "tokens": ",", "who": "<s", "milliseconds": ",.2f", "megabytes": ",.0f",
            "times_transformers": ".1f", "times_mamba_ssm": ".2f", "of_limit": ".1%", "difference": ".1e",
            "note": "<s",
        },
        limits(device, dtype),
    )  # fmt: skip
    for mode, sizes in {"forward": lengths, "forward and backward": train_lengths}.items():
        contest = Contest(device, repeats, limit)
        for tokens in sizes:
            inputs = workloads.scan_inputs(channels, tokens, states, device, dtype)
            runs = {name: workloads.build_scan(name, inputs, mode != "forward") for name in names}
            outcomes = contest.run(f"{mode}, {tokens} tokens", runs)
            least = workloads.scan_bytes(inputs) / report.limits["bytes_per_second"]
            expected: Any = next((o.result for o in outcomes.values() if o.result is not None), None)
            for name, outcome in outcomes.items():
                row: dict[str, Any] = {"mode": mode, "tokens": tokens, "who": name, "note": outcome.note}
                if outcome.median is not None:
                    row |= {"milliseconds": outcome.median * 1e3, "of_limit": least / outcome.median}
                    row["difference"] = workloads.difference(outcome.result, expected)
                    for peer in ("transformers", "mamba_ssm"):
                        if peer in outcomes and peer != name:
                            row[f"times_{peer}"] = ratio(outcome.seconds, outcomes[peer].seconds)
                if name not in contest.left:
                    results, peak = peak_memory(device, runs[name])
                    if peak is not None:
                        row["megabytes"] = max(peak - sum(t.nbytes for t in results), 0) / 1e6
                    del results
                report.add(row)
            del inputs, runs, outcomes, expected
    report.lines = [
        "megabytes: the most beyond inputs and outputs. of limit: reading the inputs and writing the output once, as",
        f"a share of the time taken. difference: the largest, relative to {names[0]}.",
    ]
    report.plot = _plot(report, "Selective scan", "tokens", "milliseconds", lambda row: f"{row['who']}, {row['mode']}")
    return report


def measure_prefill(
    device: torch.device,
    dtype: torch.dtype,
    size: str,
    lengths: Sequence[int],
    repeats: int,
    limit: float,
    folder: Path | None,
) -> Report:
    """Reading a text: our language model and transformers' JambaForCausalLM on the same weights, eager."""
    report = Report(
        "prefill",
        folder,
        machine(device, dtype),
        {"config": size, "scan": selective_scan_backend(device), "repeats": repeats},
        {
            "tokens": ",", "who": "<s", "seconds": ",.3f", "tokens_per_second": ",.0f", "gigabytes": ".3f",
            "gigabytes_in_all": ".2f", "times_transformers": ".1f", "limit_seconds": ".3f", "of_limit": ".1%",
            "paper_seconds": ".1f", "paper_gigabytes": ".1f", "difference": ".1e", "note": "<s",
        },
        limits(device, dtype),
    )  # fmt: skip
    model = workloads.build_model(workloads.build_config(size), device, dtype)
    models = {"longllava": model, "transformers": workloads.build_peer(model)}
    weights = sum(weight.nbytes for weight in model.parameters())
    paper = PAPER.get(size, {})
    contest = Contest(device, repeats, limit)
    for tokens in lengths:
        ids = workloads.random_ids(model.config, tokens, device)
        runs = {name: _last_logits(part, ids) for name, part in models.items()}
        outcomes = contest.run(f"{tokens} tokens", runs)
        least = workloads.prefill_flops(model, tokens) / report.limits["flops_per_second"]
        for name, outcome in outcomes.items():
            row: dict[str, Any] = {"tokens": tokens, "who": name, "note": outcome.note}
            if outcome.median is not None:
                row |= {"seconds": outcome.median, "tokens_per_second": tokens / outcome.median}
                row |= {"limit_seconds": least, "of_limit": least / outcome.median}
            if name == "longllava":
                row["times_transformers"] = ratio(outcome.seconds, outcomes["transformers"].seconds)
                if tokens == paper.get("context"):
                    row |= {"paper_seconds": paper["prefill_seconds"], "paper_gigabytes": paper["gigabytes"]}
            elif outcome.result is not None and outcomes["longllava"].result is not None:
                row["difference"] = workloads.difference((outcomes["longllava"].result,), (outcome.result,))
            if name not in contest.left:
                _, peak = peak_memory(device, runs[name])
                if peak is not None:
                    row |= {"gigabytes": peak / 1e9, "gigabytes_in_all": (weights + peak) / 1e9}
            report.add(row)
    for name in models:
        for key, unit in (("seconds", "milliseconds"), ("gigabytes", "megabytes")):
            found = [(row["tokens"], row[key]) for row in report.rows if row["who"] == name and key in row]
            growth = slope([tokens for tokens, _ in found], [value for _, value in found])
            if growth is not None:
                report.summary[f"{name}_{unit}_per_1000_tokens"] = growth * 1e6
                report.lines.append(f"{name}: {growth * 1e6:.2f} {unit} per 1,000 tokens (least squares)")
    report.lines += [
        "gigabytes: the most beyond the weights, the cache included. limit: matrix products and attention alone, two",
        "operations per multiplication and addition, at the measured rate. difference: of the last position's logits.",
    ]
    report.plot = _plot(report, f"Prefill, {size}", "tokens", "seconds", lambda row: row["who"])
    return report


def _last_logits(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=True, logits_to_keep=1).logits[0, -1].float()

    return run


def measure_images(
    device: torch.device,
    dtype: torch.dtype,
    size: str,
    counts: Sequence[int],
    tails: Sequence[int],
    tokens_per_image: int | None,
    prefill_chunk_size: int,
    budget_gb: float | None,
    folder: Path | None,
) -> Report:
    """Pictures end to end: from files on the disk to the first token of the answer.

    `tails` are numbers of pictures that are not read in full: the last pieces of their prompts run on a cache that is
    already as long. With a budget the largest number that fits is found in the same way.
    """
    keep_nothing_freed()  # memory is what this is about; on a CPU the seconds are longer for it
    config = workloads.build_config(size)
    tokens_per_image = tokens_per_image or config.tokens_per_image
    report = Report(
        "images",
        folder,
        machine(device, dtype),
        {
            "config": size, "scan": selective_scan_backend(device), "tokens_per_image": tokens_per_image,
            "prefill_chunk_size": prefill_chunk_size, "files": f"JPEG {workloads.PICTURE[0]} x {workloads.PICTURE[1]}",
            "budget_gb": budget_gb,
        },
        {
            "pictures": ",", "shown_by": "<s", "tokens": ",", "seconds": ",.2f", "pictures_per_second": ",.1f",
            "gigabytes": ".3f", "gigabytes_cache": ".3f", "gigabytes_beside": ".3f", "gigabytes_in_all": ".2f",
            "limit_seconds": ".2f", "of_limit": ".1%", "tokens_per_second": ".1f", "note": "<s",
        },
    )  # fmt: skip
    with budget(device, budget_gb), tempfile.TemporaryDirectory() as drawn:
        report.limits = limits(device, dtype)
        model = workloads.build_model(config, device, dtype)
        reader = _Reader(
            model, workloads.build_processor(config), workloads.write_pictures(Path(drawn)), tokens_per_image,
            prefill_chunk_size,
        )  # fmt: skip
        reader.read(2 * prefill_chunk_size // tokens_per_image)  # what is loaded or compiled once is not timed
        for pictures in tqdm(counts, desc="pictures"):
            row: dict[str, Any] = {"pictures": pictures, "shown_by": "whole prompt"} | reader.measured(
                reader.read, pictures
            )
            if "seconds" in row:
                least = workloads.prefill_flops(model, row["tokens"], pictures) / report.limits["flops_per_second"]
                row |= {"pictures_per_second": pictures / row["seconds"], "limit_seconds": least}
                row["of_limit"] = least / row["seconds"]
            report.add(row)
        for pictures in tails:
            report.add({"pictures": pictures, "shown_by": "last pieces"} | reader.measured(reader.end, pictures))
        if budget_gb is not None:
            reasons = [""]

            def fits(pictures: int) -> bool:
                found = reader.measured(reader.end, pictures)
                reasons.append(found.get("note") or reasons[-1])
                return "seconds" in found

            most = largest(fits)
            report.summary |= {"largest_number_of_pictures": most, "why_not_more": reasons[-1]}
            report.lines.append(
                f"{most:,} pictures fit into {budget_gb:g} GB, shown by the last pieces; more: {reasons[-1]}"
            )
            if "pictures" in PAPER.get(size, {}):
                report.lines.append(f"the paper: {PAPER[size]['pictures']:,} pictures on a GPU of 80 GB")
    whole = [row for row in report.rows if row["shown_by"] == "whole prompt" and "gigabytes" in row]
    if len(whole) > 1 and whole[-2]["gigabytes"]:
        for key, what in (("gigabytes", "the weights"), ("gigabytes_beside", "weights and cache")):
            growth = whole[-1][key] / whole[-2][key]
            report.summary[f"{key}_growth"] = growth
            report.lines.append(
                f"memory beyond {what}, {whole[-1]['pictures']:,} against {whole[-2]['pictures']:,} pictures: "
                f"{growth:.3f} times"
            )
    report.lines += [
        "gigabytes: the most beyond the weights; beside: the same without the cache. last pieces: the seconds",
        f"of {TAIL_PIECES} pieces of {prefill_chunk_size} tokens on a cache that is already that long, then decoding.",
    ]
    report.plot = _plot(report, f"Pictures, {size}", "pictures", "seconds", lambda row: row["shown_by"])
    return report


class _Reader:
    """A model that reads pictures from files, and how long and how much memory that takes."""

    def __init__(
        self,
        model: LongLlavaForConditionalGeneration,
        processor: LongLlavaProcessor,
        paths: list[Path],
        tokens_per_image: int,
        prefill_chunk_size: int,
    ):
        self.model: Any = model
        self.processor, self.paths = processor, paths
        self.tokens_per_image, self.prefill_chunk_size = tokens_per_image, prefill_chunk_size
        self.weights = sum(weight.nbytes for weight in model.parameters())

    def inputs(self, pictures: int) -> dict[str, Any]:
        """The prompt with so many pictures, which are read from their files when the model comes to them."""
        inputs = self.processor.apply_chat_template(
            workloads.conversation(self.paths, pictures, QUESTION),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            stream_pictures=True,
            tokens_per_image=self.tokens_per_image,
        )
        text = {name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        return {**inputs, **text}

    def read(self, pictures: int) -> dict[str, Any]:
        """From the files to the first token, in one call of `generate`."""
        inputs = self.inputs(pictures)
        output = self.model.generate(
            **inputs,
            max_new_tokens=1,
            do_sample=False,
            prefill_chunk_size=self.prefill_chunk_size,
            return_dict_in_generate=True,
        )
        return {"tokens": inputs["input_ids"].shape[1], "cache": workloads.cache_bytes(output.past_key_values)}

    def end(self, pictures: int) -> dict[str, Any]:
        """The last pieces of the prompt of so many pictures, on a cache that holds what comes before them."""
        one, two = (self.inputs(count)["input_ids"].shape[1] for count in (1, 2))
        tokens = one + (pictures - 1) * (two - one)
        inputs = self.inputs(min(pictures, max(TAIL_PIECES * self.prefill_chunk_size // (two - one), 1)))
        context = tokens - inputs["input_ids"].shape[1]
        cache = LongLlavaCache(self.model.config)
        cache.reserve(tokens + tokens // 16)  # as `generate` does
        device = self.model.device
        if context > workloads.START:
            workloads.fill_cache(self.model, self.model.config.text_config, cache, context)
        del inputs["attention_mask"]
        options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        with torch.no_grad():
            whole = partial(self.model, **inputs, **options, prefill_chunk_size=self.prefill_chunk_size)
            out, seconds = timed(device, whole)
            token = out.logits[:, -1:].argmax(-1)
            rates = []
            for _ in range(TAIL_TOKENS):
                out, step = timed(device, partial(self.model, input_ids=token, **options))
                token = out.logits[:, -1:].argmax(-1)
                rates.append(1 / step)
        found = {"tokens": tokens, "cache": workloads.cache_bytes(cache), "seconds": seconds}
        return found | {"tokens_per_second": statistics.median(rates)}

    def measured(self, run: Callable[[int], dict[str, Any]], pictures: int) -> dict[str, Any]:
        """Figures of one run, or a `note` that says why there are none."""
        device = self.model.device
        try:
            (found, seconds), peak = peak_memory(device, lambda: timed(device, lambda: run(pictures)))
        except Exception as error:
            return {"note": why(error)}
        cache = found.pop("cache")
        figures = {"seconds": seconds, "gigabytes_cache": cache / 1e9, **found}
        if peak is not None:
            figures |= {"gigabytes": peak / 1e9, "gigabytes_beside": (peak - cache) / 1e9}
            figures["gigabytes_in_all"] = (self.weights + peak) / 1e9
        return figures


def largest(fits: Callable[[int], bool], start: int = 1000) -> int:
    """The largest number that fits, to one in a hundred; 0 if not even one does."""
    low, high = 0, start
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, int(SEARCH * low)):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def measure_pictures(count: int, repeats: int, limit: float, folder: Path | None) -> Report:
    """Preparing picture files for the 9B: our processor against transformers' image processor in one call."""
    device = torch.device("cpu")
    report = Report(
        "pictures",
        folder,
        machine(device, torch.float32),
        {"files": f"{count} JPEG {workloads.PICTURE[0]} x {workloads.PICTURE[1]}", "repeats": repeats},
        {
            "who": "<s", "seconds": ".2f", "pictures_per_second": ",.1f", "gigabytes": ".2f",
            "times_transformers": ".2f", "difference": ".2f", "note": "<s",
        },
    )  # fmt: skip
    processor = workloads.build_processor(workloads.build_config("9b"))
    peer = processor.image_processor
    with tempfile.TemporaryDirectory() as drawn:
        files = workloads.write_pictures(Path(drawn))
        paths = [files[number % len(files)] for number in range(count)]
        runs = {
            "longllava": lambda: processor(images=paths, return_tensors="pt")["pixel_values"],
            "transformers": lambda: peer([Image.open(path) for path in paths], return_tensors="pt")["pixel_values"],
        }
        contest = Contest(device, repeats, limit)
        outcomes = contest.run(f"{count} pictures", runs)
        for name, outcome in outcomes.items():
            row: dict[str, Any] = {"who": name, "note": outcome.note}
            if outcome.median is not None:
                row |= {"seconds": outcome.median, "pictures_per_second": count / outcome.median}
            if name == "longllava":
                row["times_transformers"] = ratio(outcome.seconds, outcomes["transformers"].seconds)
                results = [o.result for o in outcomes.values()]
                if None not in results:
                    deviation = torch.tensor(peer.image_std)[:, None, None]
                    row["difference"] = ((results[0] - results[1]).abs() * deviation * 255).max().item()
                del results
            outcome.result = None
            if name not in contest.left:
                _, peak = peak_memory(device, runs[name])
                row |= {} if peak is None else {"gigabytes": peak / 1e9}
            report.add(row)
    report.lines = [
        "difference: the largest of any pixel, in steps of 255; a JPEG file is drafted where it is far larger."
    ]
    return report


def measure_decode(
    device: torch.device,
    dtype: torch.dtype,
    size: str,
    contexts: Sequence[int],
    names: Sequence[str],
    tokens: int,
    repeats: int,
    folder: Path | None,
) -> Report:
    """New tokens behind a long context, whose cache is filled and not read: `generate` with three kinds of cache.

    `longllava` grows in place, `longllava static` has a fixed size (compiled by `generate` on a GPU), `transformers`
    is JambaForCausalLM with the same weights on its DynamicCache, which it copies for every token. One after the
    other, so that each has the memory for itself.
    """
    report = Report(
        "decode",
        folder,
        machine(device, dtype),
        {"config": size, "scan": selective_scan_backend(device), "tokens": tokens, "repeats": repeats},
        {
            "context": ",", "who": "<s", "tokens_per_second": ",.1f", "milliseconds": ",.2f", "gigabytes": ".3f",
            "times_transformers": ".1f", "limit_tokens_per_second": ",.1f", "of_limit": ".1%",
            "paper_tokens_per_second": ".1f", "same_tokens": "<s", "note": "<s",
        },
        limits(device, dtype),
    )  # fmt: skip
    model = workloads.build_model(workloads.build_config(size), device, dtype)
    text = model.config.text_config
    peer = workloads.build_peer(model)
    paper = PAPER.get(size, {})
    contest = Contest(device, repeats, limit=math.inf)  # the first run may compile: it is never a figure
    for context in contexts:
        room = context + tokens * (repeats + 1) + 1
        caches: dict[str, tuple[Any, Callable[[], Cache]]] = {
            "longllava": (model, partial(LongLlavaCache, model.config)),
            STATIC: (model, partial(StaticCache, text, max_cache_len=room)),
            "transformers": (peer, partial(DynamicCache, config=peer.config)),
        }
        outcomes: dict[str, Outcome] = {}
        peaks: dict[str, int | None] = {}
        for name in names:
            if name == STATIC and context > STATIC_CONTEXT:
                outcomes[name] = Outcome(note=f"left out above {STATIC_CONTEXT:,} tokens: compiled for each size")
                continue
            run = _decoder(*caches[name], text, workloads.random_ids(model.config, context + 1, device), tokens)
            found, peaks[name] = peak_memory(device, partial(contest.run, f"{context} tokens", {name: run}))
            outcomes |= found
        least = workloads.decode_bytes(model, context) / report.limits["bytes_per_second"]
        for name, outcome in outcomes.items():
            row: dict[str, Any] = {"context": context, "who": name, "note": outcome.note}
            if outcome.median is not None:
                step = outcome.median / tokens
                row |= {"tokens_per_second": 1 / step, "milliseconds": step * 1e3}
                row |= {"limit_tokens_per_second": 1 / least, "of_limit": least / step}
                if (peak := peaks[name]) is not None:
                    row["gigabytes"] = peak / 1e9
                row["same_tokens"] = "yes" if outcome.result == outcomes[names[0]].result else "no"
                if name != "transformers" and "transformers" in outcomes:
                    row["times_transformers"] = ratio(outcome.seconds, outcomes["transformers"].seconds)
                if context == paper.get("context"):
                    row["paper_tokens_per_second"] = paper["tokens_per_second"]
            report.add(row)
    report.lines = [
        "limit: weights and cache read once per token at the measured rate of a copy. gigabytes: the most beyond the",
        "weights, also while the cache was filled. same tokens: as the first; in 16 bits near ties may differ.",
    ]
    report.plot = _plot(report, f"Decoding, {size}", "context", "tokens_per_second", lambda row: row["who"])
    return report


def _decoder(
    model: Any, make_cache: Callable[[], Cache], config: Any, ids: Tensor, tokens: int
) -> Callable[[], list[int]]:
    """Each call generates so many tokens more; the first one also fills the cache."""
    state: dict[str, Any] = {"ids": ids}

    def run() -> list[int]:
        if "cache" not in state:
            state["cache"] = workloads.fill_cache(model, config, make_cache(), ids.shape[1] - 1)
        options = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False}
        state["ids"] = model.generate(state["ids"], past_key_values=state["cache"], **options)
        return state["ids"][0, -tokens:].tolist()

    return run


def measure_session(
    device: torch.device,
    dtype: torch.dtype,
    size: str,
    pictures: int,
    questions: int,
    scratch: int,
    max_new_tokens: int,
    folder: Path | None,
) -> Report:
    """A conversation about many pictures: in a session, and some of its questions asked again from scratch.

    From scratch is a fresh `generate` on the whole conversation up to the question: files, pictures, turns and all.
    """
    report = Report(
        "session",
        folder,
        machine(device, dtype),
        {"config": size, "scan": selective_scan_backend(device), "pictures": pictures, "questions": questions,
         "files": f"JPEG {workloads.PICTURE[0]} x {workloads.PICTURE[1]}"},
        {
            "question": ",", "tokens": ",", "session_seconds": ".3f", "scratch_seconds": ",.2f",
            "times_faster": ",.1f", "same_answer": "<s",
        },
    )  # fmt: skip
    model, processor = workloads.load_model(size, device, dtype)
    with tempfile.TemporaryDirectory() as drawn:
        paths = workloads.write_pictures(Path(drawn))
        asked = _questions(questions)
        # The second question and the last one are always among those that are asked again.
        again = {1 + round(number * (questions - 2) / max(scratch - 1, 1)) for number in range(scratch)}
        for count, warm in ((2, True), (pictures, False)):
            session = LongLlavaSession(model, processor)
            messages = workloads.conversation(paths, count, asked[0])
            files = [block["path"] for block in messages[0]["content"][:-1]]
            _, watching = timed(device, partial(session.watch, images=files))
            for number, question in enumerate(asked[:2] if warm else tqdm(asked, desc="questions")):
                if number > 0:
                    messages.append({"role": "user", "content": question})
                ask = partial(session.ask, question, max_new_tokens=max_new_tokens, do_sample=False)
                answer, seconds = timed(device, ask)
                row: dict[str, Any] = {
                    "question": number + 1,
                    "tokens": session.num_tokens,
                    "session_seconds": seconds,
                }
                if number in again:
                    start_again = partial(_from_scratch, model, processor, messages, max_new_tokens)
                    fresh, scratch_seconds = timed(device, start_again)
                    row |= {"scratch_seconds": scratch_seconds, "times_faster": scratch_seconds / seconds}
                    row["same_answer"] = "yes" if fresh == answer else "no"
                if not warm:
                    report.add(row)
                messages.append({"role": "assistant", "content": answer})
    compared = [row for row in report.rows if "times_faster" in row]
    later = [row["session_seconds"] for row in report.rows[1:]]
    report.summary = {
        "watching_seconds": watching,
        "median_seconds_of_later_questions": statistics.median(later) if later else None,
        "times_faster": statistics.median(row["times_faster"] for row in compared) if compared else None,
        "answers_equal": all(row["same_answer"] == "yes" for row in compared),
    }
    report.lines.append(f"watching {pictures:,} pictures: {watching:.2f} s, once")
    if compared:
        equal = sum(row["same_answer"] == "yes" for row in compared)
        report.lines.append(
            f"{report.summary['times_faster']:,.1f} times faster than from scratch (median of {len(compared)} "
            f"questions), {equal} of {len(compared)} answers equal"
        )
    report.plot = {
        "title": f"Questions on {pictures:,} pictures, {size}", "x_label": "question", "y_label": "seconds",
        "series": {
            "in a session": ([r["question"] for r in report.rows], [r["session_seconds"] for r in report.rows]),
            "from scratch": ([r["question"] for r in compared], [r["scratch_seconds"] for r in compared]),
        },
    }  # fmt: skip
    return report


def _questions(count: int) -> list[str]:
    """So many questions about pictures, one after the other from the pocket's tasks."""
    texts = [text.format(colour=colour, digit=3) for colour in COLOURS for kind in QUESTIONS.values() for text in kind]
    different = list(dict.fromkeys(texts))
    return [different[number % len(different)] for number in range(count)]


def _from_scratch(
    model: LongLlavaForConditionalGeneration,
    processor: LongLlavaProcessor,
    messages: list[dict[str, Any]],
    max_new_tokens: int,
) -> str:
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        stream_pictures=True,
    )
    text = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    ids = model.generate(**{**inputs, **text}, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.decode(ids[0, text["input_ids"].shape[1] :], skip_special_tokens=True)


def _plot(report: Report, title: str, x: str, y: str, name: Callable[[dict[str, Any]], str]) -> dict[str, Any]:
    """One line per name, of the rows that have a y."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    for row in report.rows:
        if row.get(y) is not None:
            xs, ys = series.setdefault(name(row), ([], []))
            xs.append(row[x])
            ys.append(row[y])
    title = f"{title}: {report.machine['name']}, {report.machine['dtype']}"
    return {"title": title, "x_label": x, "y_label": y.replace("_", " "), "series": series}
