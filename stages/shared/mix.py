"""The sources of a data set: the section dataset itself and, with dataset.mix, further ones."""

from stages.shared.params import Dataset, Mixed, Source


def sources_of(dataset: Dataset) -> dict[str, Source]:
    """Folder below data/raw -> source that it holds: by itself the data set lies in data/raw."""
    if dataset.mix is None:
        return {"": dataset}
    return {f"source_{number}": each for number, each in enumerate([dataset, *dataset.mix])}


def label(source: Source, number: int) -> str:
    """What people are told that the source is called, with the place of its entry."""
    # As `-S dataset.mix.0.share=0.05` counts the entries, while the data set itself is source 0.
    where = f"dataset.mix.{number - 1}" if isinstance(source, Mixed) else source.section
    return f"{where} ({source.id})"
