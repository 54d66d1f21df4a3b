"""A program, not a module: saves one data set of the hub as a folder and prints one line of JSON, {"reason": ...}.

hub.py runs it and reads that line. No library message is passed on: it may contain text of an example.
"""

import errno
import json
import sys
from collections.abc import Iterator, Sequence

KINDS = ("Json", "Csv", "Parquet", "Arrow", "Text")  # builders of `datasets` that read tables and run no code
WAIT_S = 10  # for the hub's first answer
REASONS = (  # names of exceptions anywhere in the chain; the first line that matches counts
    ("gated", ("GatedRepoError",)),
    ("revision", ("RevisionNotFoundError",)),
    ("offline", ("OfflineModeIsEnabled", "ConnectError", "ConnectTimeout", "ReadTimeout", "ProxyError")),
    ("empty", ("EmptyDatasetError", "DataFilesNotFoundError")),
    ("missing", ("RepositoryNotFoundError", "DatasetNotFoundError")),
    ("offline", ("ConnectionError", "TimeoutException", "LocalEntryNotFoundError")),
)


def save(name: str, subset: str | None, revision: str | None, folder: str) -> dict[str, object]:
    """Save all splits of a data set into a folder; return the outcome."""
    import datasets
    import huggingface_hub

    # Without an answer the library retries for half a minute; this tries once.
    huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=WAIT_S)
    try:
        builder = datasets.load_dataset_builder(name, subset, revision=revision)
    except ValueError as error:
        names = subsets(name, revision)
        if (len(names) > 1 if subset is None else subset not in names) and names:
            return {"reason": "subset", "names": names}
        return explain(error)
    if not any(parent.__name__ in KINDS for parent in type(builder).__mro__):
        return {"reason": "kind"}
    builder.download_and_prepare()
    builder.as_dataset(in_memory=False).save_to_disk(folder)
    return {"reason": "done"}


def subsets(name: str, revision: str | None) -> Sequence[str]:
    import datasets

    try:
        return datasets.get_dataset_config_names(name, revision=revision)
    except Exception:  # the names only improve another error's message
        return []


def explain(error: BaseException) -> dict[str, object]:
    chain = list(causes(error))
    if any(isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT) for cause in chain):
        return {"reason": "disk"}
    if any(type(cause).__name__ == "DatasetNotFoundError" and " gated " in str(cause) for cause in chain):
        return {"reason": "gated"}  # `datasets` drops the exception that says so
    names = {parent.__name__ for cause in chain for parent in type(cause).__mro__}
    reason = next((reason for reason, known in REASONS if names & set(known)), "other")
    return {"reason": reason, "kind": type(error).__name__}


def causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


if __name__ == "__main__":
    try:
        answer = save(*json.loads(sys.argv[1]))
    except Exception as error:
        answer = explain(error)
    print(f"\n{json.dumps(answer)}", flush=True)
