from __future__ import annotations

import grpo
import ppo
import pytest
from support.runs import tiny_run

from rlalign.run import resumed_config


@pytest.mark.parametrize(("recipe", "given", "wanted"), [(grpo, "gae", "grpo"), (ppo, "grpo", "gae")])
def test_a_recipe_refuses_the_others_estimator_before_anything_starts(recipe, given, wanted, tmp_path):
    config = tiny_run(tmp_path / "run", algorithm={"adv_estimator": given})
    message = rf"adv_estimator={given}: recipes/{recipe.__name__}.py needs {wanted}; that is \w+.py's"
    with pytest.raises(ValueError, match=message):
        recipe.train(config)
    assert not (tmp_path / "run").exists()


def test_so_it_does_on_resume(tmp_path):
    (tmp_path / "config.yaml").write_text("algorithm: {adv_estimator: gae}\nrun: {}\n")
    with pytest.raises(ValueError, match="adv_estimator=gae"):
        grpo.train(resumed_config(tmp_path, []))
