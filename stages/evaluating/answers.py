"""Answers of the base and the tuned model to held-out prompts, and their scores.

    exact_match    1 if the texts are equal after stripping white space, else 0
    rouge_l        ROUGE-L: F1 of the longest common subsequence of words (0 to 1)
    chrf           chrF2 of sacrebleu: F2 over character n-grams up to 6 (0 to 100)
    json_valid     1 if the answer is JSON, for rows whose reference is a JSON object or list
    answer_tokens  tokens before the end token
    ended          1 if the model emitted an end token

Each is a mean over rows. Your own measures, from measures.py, come first. An empty thought, which
templates such as Qwen3's put before an answer, is part of no text that is scored.
"""

import inspect
import json
import math
import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rapidfuzz.distance import Indel
from sacrebleu.metrics.chrf import CHRF

from stages.evaluating import measures
from stages.evaluating.bootstrap import interval, p_value
from stages.evaluating.generation import Answer, Room, answers, forecast
from stages.shared.params import Evaluate
from stages.shared.process import StageError
from stages.shared.sets import set_name, stem_of

WHO = ("base", "tuned")
_CHRF = CHRF()
# The prompt may have opened it.
_EMPTY_THOUGHT = re.compile(r"\s*(<think>\s*)?</think>\s*")
Scores = dict[str, float | None]


@dataclass(frozen=True)
class Answered:
    """A held-out row as text, with the answers of both models and their scores.

    `place` is the row's index in its set. A score is None if the measure does not apply.
    """

    prefix: str
    place: int
    row: str
    prompt: str
    reference: str
    answers: dict[str, Answer]
    scores: dict[str, Scores]


def exact_match(reference: str, answer: str) -> float:
    return float(answer.strip() == reference.strip())


def rouge_l(reference: str, answer: str) -> float:
    """ROUGE-L F1 over lower-cased words: 2 LCS / (m + n), which is 1 - normalized Indel."""
    words = [re.findall(r"[^\W_]+", text.lower()) for text in (reference, answer)]
    return Indel.normalized_similarity(*words) if all(words) else 0.0


def chrf(reference: str, answer: str) -> float:
    return _CHRF.sentence_score(answer, [reference]).score


def json_valid(reference: str, answer: str) -> float | None:
    """None if the reference is not a JSON object or list, so that JSON was not asked for."""
    if not isinstance(_json(reference), dict | list):
        return None
    return float(_json(answer) is not _INVALID)


_INVALID = object()


def _json(text: str):
    def refuse(constant: str):
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return _INVALID


def scores_of(row: str, prompt: str, reference: str, answer: Answer, own: list[str]) -> Scores:
    """Measure name -> score of one answer; those named in `own` come first."""
    reference, text = map(_without_empty_thought, (reference, answer.text))
    scores: Scores = {
        name: _own_score(getattr(measures, name), row, (prompt, reference, text)) for name in own
    }
    return scores | {
        "exact_match": exact_match(reference, text),
        "rouge_l": rouge_l(reference, text),
        "chrf": chrf(reference, text),
        "json_valid": json_valid(reference, text),
        "answer_tokens": float(answer.tokens),
        "ended": float(answer.ended),
    }


def _without_empty_thought(text: str) -> str:
    thought = _EMPTY_THOUGHT.match(text)
    return text[thought.end() :] if thought else text


def _own_score(measure: Callable, row: str, texts: tuple[str, str, str]) -> float:
    """The value of a measure in measures.py. Raises StageError naming its line and the row."""
    line = inspect.unwrap(measure).__code__.co_firstlineno
    try:
        value = float(measure(*texts))
        reason = "" if math.isfinite(value) else f"returned {value}, not a finite number"
    except (Exception, SystemExit) as error:  # a user's code may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        inside = [frame.lineno for frame in frames if frame.filename == measures.__file__]
        line = next((number for number in reversed(inside) if number), line)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    if reason:
        where = f"stages/evaluating/measures.py:{line}"
        raise StageError(f"{where}: {measure.__name__} failed on row {row}: {reason}")
    return value


def answered(
    model,
    tokenizer,
    sets: dict[str, list[dict]],
    params: Evaluate,
    ends: list[int],
    room: Room | None = None,
) -> list[Answered]:
    """The first held-out prompts of each set, `params.samples` in all, answered and scored.

    Rows without a prompt (plain text, later parts of a split row) are skipped. `room` is given
    for a model with streamed weights; then a time estimate is printed first.
    """
    asked = {prefix: some for prefix, rows in sets.items() if (some := _with_prompt(rows))}
    chosen = [
        (prefix, place, row)
        for i, (prefix, some) in enumerate(asked.items())
        for place, row in some[: (params.samples + i) // len(asked)]
    ]
    if not chosen:
        return []
    prompts = [row["input_ids"][: row["prompt_tokens"]] for _, _, row in chosen]
    limit, own = params.max_answer_tokens, params.measures
    cut = sum(len(row["input_ids"]) - row["prompt_tokens"] > limit for _, _, row in chosen)
    if cut:
        print(
            f"warning: {cut} of {len(chosen)} references have more than {limit} tokens, the limit "
            "for answers; raise evaluate.max_answer_tokens"
        )
    if room:
        print(f"evaluate: {forecast(prompts, limit, room)}", flush=True)
    written = {"tuned": answers(model, tokenizer, prompts, ends, limit, room)}
    with model.disable_adapter():
        written["base"] = answers(model, tokenizer, prompts, ends, limit, room)
    found = []
    for i, (prefix, place, row) in enumerate(chosen):
        prompt = tokenizer.decode(prompts[i])
        rest = row["input_ids"][row["prompt_tokens"] :]
        reference = tokenizer.decode(rest, skip_special_tokens=True)
        both = {who: written[who][i] for who in WHO}
        scores = {w: scores_of(row["row"], prompt, reference, a, own) for w, a in both.items()}
        found.append(Answered(prefix, place, row["row"], prompt, reference, both, scores))
    return found


def _with_prompt(rows: list[dict]) -> list[tuple[int, dict]]:
    return [(place, row) for place, row in enumerate(rows) if row["prompt_tokens"]]


def answer_metrics(found: Sequence[Answered]) -> dict[str, float | int]:
    """metrics/answers.json: each measure of each set with its interval, and p of base vs. tuned."""
    metrics: dict[str, float | int] = {}
    for prefix in dict.fromkeys(one.prefix for one in found):
        rows = [one for one in found if one.prefix == prefix]
        metrics[f"{prefix}answered_rows"] = len(rows)
        for name in rows[0].scores["base"]:
            pairs = [[one.scores[who][name] for who in WHO] for one in rows]
            both = [(b, t) for b, t in pairs if b is not None and t is not None]
            if not both:
                continue
            if len(both) < len(rows):
                metrics[f"{prefix}{name}_rows"] = len(both)
            for who, values in zip(WHO, zip(*both, strict=True), strict=True):
                key = f"{prefix}{who}_{name}"
                metrics[key] = math.fsum(values) / len(values)
                low, high = interval([(value, 1.0) for value in values])
                metrics |= {f"{key}_low": low, f"{key}_high": high}
            metrics[f"{prefix}{name}_p_value"] = p_value([tuned - base for base, tuned in both])
    return metrics


def sample(one: Answered) -> dict:
    """One line of metrics/samples.jsonl."""
    return {
        "row": one.row,
        "set": set_name(stem_of(one.prefix)).replace("rows", "row").removesuffix("s"),
        "prompt": one.prompt,
        "reference": one.reference,
        **{who: answer.text for who, answer in one.answers.items()},
        **{f"{who}_scores": scores for who, scores in one.scores.items()},
    }
