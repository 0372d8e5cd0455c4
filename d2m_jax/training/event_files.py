"""The parts of tensorboardX that write event files.

It imports torch wherever that is installed: half of the time in which a run starts, for tensors
that nobody here has. So for the moment of its import torch is not there.
"""

import sys
from typing import Any

_hidden = "torch" not in sys.modules
if _hidden:
    sys.modules["torch"] = None  # pyright: ignore[reportArgumentType] (what makes an import fail)
try:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto import event_pb2
    from tensorboardX.summary import histogram, image, scalar
finally:
    if _hidden:
        del sys.modules["torch"]

Event: Any = getattr(event_pb2, "Event")  # noqa: B009 (protobuf makes them when it is imported)
SessionLog: Any = getattr(event_pb2, "SessionLog")  # noqa: B009

__all__ = ["Event", "EventsWriter", "SessionLog", "histogram", "image", "scalar"]
