"""What libraries log and is of no use to those who run our programs."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without(logger: str, text: str) -> Iterator[None]:
    """While it lasts, a logger drops the messages that hold this text."""

    def keeps(record: logging.LogRecord) -> bool:
        return text not in record.getMessage()

    found = logging.getLogger(logger)
    found.addFilter(keeps)
    try:
        yield
    finally:
        found.removeFilter(keeps)
