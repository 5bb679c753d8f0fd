"""The sources of a data set: the section dataset itself and those in dataset.mix."""

from stages.shared.params import Dataset, Mixed, Source


def sources_of(dataset: Dataset) -> dict[str, Source]:
    """Folder below data/raw -> source; a single source is in data/raw itself."""
    if dataset.mix is None:
        return {"": dataset}
    return {f"source_{number}": each for number, each in enumerate([dataset, *dataset.mix])}


def label(source: Source, number: int) -> str:
    """The source's name for messages, with its entry in params.yaml."""
    # Entries are counted as in `-S dataset.mix.0.share=0.05`; the data set itself is source 0.
    where = f"dataset.mix.{number - 1}" if isinstance(source, Mixed) else source.section
    return f"{where} ({source.id})"
