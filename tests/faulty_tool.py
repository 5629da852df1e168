"""A tool with every fault. It lies apart from the tests so that a worker process that imports it starts quickly."""

import ctypes
import os
import subprocess
import sys
import time
from typing import Any


def fault(kind: str) -> Any:
    """Does what tools should not do.

    Args:
        kind: which fault
    """
    match kind:
        case "raise":
            raise KeyError("no such thing")
        case "exit":
            sys.exit("enough")
        case "hang":
            time.sleep(100)
        case "in C":
            return sum(range(10**12))
        case "children":
            return subprocess.run(["sleep", "98765"], check=True).returncode
        case "megabytes":
            return "x" * 20_000_000
        case "long error":
            raise ValueError("x" * 20_000_000)
        case "memory":
            return len("x" * 2**31)
        case "bytes":
            return b"\x00\xff" * 10
        case "bytes inside":
            return {"a": [b"\x00"]}
        case "object":
            return object()
        case "cycle":
            values = []
            values.append(values)
            return values
        case "digits":
            return 10**5000
        case "recursion":
            return fault(kind)
        case "dead":
            os._exit(3)
        case "segfault":
            return ctypes.string_at(0)
        case "output":
            print("x" * 1_000_000)
            return "printed"
        case "process":
            return os.getpid()
