"""Stages of gpu_run.py, one file each: `python -m gpu.STAGE SETTINGS` prints results."""
