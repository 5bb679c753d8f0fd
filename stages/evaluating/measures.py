"""Your own measures of an answer: those named in `evaluate.measures` of params.yaml are taken.

A measure is a function of three texts that gives a number. More is better. The report counts as
right what the first one gives more than 0.5.

    prompt     what the model was asked, template included
    reference  the held-out row's own answer
    answer     what the model wrote, up to its end token

docs/evaluation.md shows how to add one.
"""

from itertools import takewhile


def command_and_flags(prompt: str, reference: str, answer: str) -> float:
    """Half for the words of the command before its first flag, half for the F1 of its flags."""
    (command, flags), (wanted, wanted_flags) = _command(answer), _command(reference)
    count = len(flags) + len(wanted_flags)
    f1 = 2 * len(flags & wanted_flags) / count if count else 1.0
    return 0.5 * (command == wanted) + 0.5 * f1


def _command(text: str) -> tuple[list[str], set[str]]:
    """`az vm list -g mine --show-details` as (az vm list, {-g, --show-details})."""
    words = text.split()
    flags = {word.partition("=")[0] for word in words if word.startswith("-")}
    return list(takewhile(lambda word: not word.startswith("-"), words)), flags
