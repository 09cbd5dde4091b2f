"""Keeps pytest out of this folder: `run.py` is started by hand or by a build, see README.md."""

collect_ignore = ["run.py", "cases.py"]
