"""Your own measures of an answer; `evaluate.measures` in params.yaml names those to use.

A measure is a function of three texts that returns a number; higher is better. The report counts
an answer as right if the first measure exceeds 0.5.

    prompt     what the model was asked, template included
    reference  the held-out row's own answer
    answer     what the model wrote, up to its end token

Neither begins with an empty thought such as Qwen3's; one with content is part of both texts.
docs/evaluation.md shows how to add one.
"""

from itertools import takewhile


def command_and_flags(prompt: str, reference: str, answer: str) -> float:
    """Half for the words before the first flag being equal, half for the F1 of the flags."""
    (command, flags), (wanted, wanted_flags) = _command(answer), _command(reference)
    count = len(flags) + len(wanted_flags)
    f1 = 2 * len(flags & wanted_flags) / count if count else 1.0
    return 0.5 * (command == wanted) + 0.5 * f1


def _command(text: str) -> tuple[list[str], set[str]]:
    """`az vm list -g mine --show-details` as (az vm list, {-g, --show-details})."""
    words = text.split()
    flags = {word.partition("=")[0] for word in words if word.startswith("-")}
    return list(takewhile(lambda word: not word.startswith("-"), words)), flags
