"""The report of a distillation run: report.json for programs, report.html and a table for people."""

import datetime
import io
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import rich.table
from matplotlib.figure import Figure
from rich.console import Console
from rich.text import Text

from d2m_jax.config import to_json
from d2m_jax.data.icons import CATEGORIES
from d2m_jax.evaluate import benchmark, latency, page, pictures, routing, tables
from d2m_jax.evaluate.accounting import Account, account
from d2m_jax.evaluate.comparison import By, Comparison, Verdict, compare, note, verdicts
from d2m_jax.evaluate.held_out import BATCH
from d2m_jax.evaluate.measure import Bench, Measured, png, write_whole
from d2m_jax.evaluate.rows import ROOT, Row, Run, read
