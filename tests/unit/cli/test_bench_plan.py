from __future__ import annotations

import pytest
import torch

from esper_rpc.errors import ConfigError
from esper_servers.cli.bench.served_plan import serving_plan
from esper_servers.cli.home import Home


def test_a_plan_that_is_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--plan is 'tpu'; choose compiled, eager or cuda"):
        serving_plan("tpu", Home(tmp_path), {})


def test_whatever_is_set_the_eager_plan_is_measured_on_the_cpu(tmp_path):
    environ = serving_plan("eager", Home(tmp_path), {"ESPER_PLAN_DEVICE": "auto"})
    assert environ == {"ESPER_PLAN_COMPILE": "false", "ESPER_PLAN_DEVICE": "cpu"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch finds a CUDA device")
def test_a_device_is_measured_only_where_there_is_one(tmp_path):
    with pytest.raises(ConfigError, match="No CUDA device can be used: torch"):
        serving_plan("cuda", Home(tmp_path), {})


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_a_device_that_is_there_is_measured(tmp_path):
    environ = serving_plan("cuda", Home(tmp_path), {})
    assert environ == {"ESPER_PLAN_COMPILE": "false", "ESPER_PLAN_DEVICE": "cuda"}
