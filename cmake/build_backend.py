"""The build backend: scikit-build-core, plus torch where none is found.

Only torch's headers are needed, and any torch from 2.10 on will do, so a machine that has one
fetches nothing; elsewhere torch becomes a requirement of the isolated build. A build without torch
ends in one sentence.
"""

import os

import find_torch
from scikit_build_core import build as _build
from scikit_build_core.build import *  # noqa: F403


def get_requires_for_build_wheel(config_settings=None):
    if "TSAM_TORCH_DIR" in os.environ:
        find_torch.require()  # a wrong folder is not a reason to fetch another torch
    wanted = [] if find_torch.search().folder else [f"torch>={find_torch.MINIMUM}"]
    return _build.get_requires_for_build_wheel(config_settings) + wanted


get_requires_for_build_editable = get_requires_for_build_wheel


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    find_torch.require()
    return _build.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    find_torch.require()
    return _build.build_editable(wheel_directory, config_settings, metadata_directory)
