"""The picture world's start model: how it is made, and that the one that ships sees and names."""

import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from beavertails_v import Picture, Prompt
from beavertails_v.picture_world.draw import draw, world
from safe_rlhf_v.config import SettingsError
from safe_rlhf_v.demo import naming, tower
from safe_rlhf_v.demo.tiny import picture_world_model, write_picture_world_model
from safe_rlhf_v.demo.tower import TowerSettings, pretrain_tower, random_scenes
from safe_rlhf_v.vlm.processing import Encoder

SMALL = TowerSettings(pictures=12, steps=4, batch_size=4, save_steps=2)


def weights(folder):
    return load_file(folder / "tower.safetensors")


def test_a_killed_tower_goes_on_and_ends_as_the_unbroken_one(tmp_path, monkeypatch):
    pretrain_tower(tmp_path / "whole", SMALL)
    save = tower._save

    def save_and_die(path, state):
        save(path, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(tower, "_save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        pretrain_tower(tmp_path / "killed", SMALL)
    monkeypatch.setattr(tower, "_save", save)
    assert not (tmp_path / "killed" / "tower.safetensors").exists()
    pretrain_tower(tmp_path / "killed", SMALL)
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert not (tmp_path / "killed" / "tower.checkpoint").exists()


def test_a_tower_of_other_settings_is_not_gone_on_with(tmp_path, monkeypatch):
    save = tower._save

    def save_and_die(path, state):
        save(path, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(tower, "_save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        pretrain_tower(tmp_path, SMALL)
    monkeypatch.setattr(tower, "_save", save)
    with pytest.raises(SettingsError, match=r"tower.checkpoint .* other settings: seed \(0 then, 1 now\)"):
        pretrain_tower(tmp_path, replace(SMALL, seed=1))
    assert pretrain_tower(tmp_path, replace(SMALL, save_steps=3))["settings"]["save_steps"] == 3


def test_naming_writes_a_start_model_whose_tower_is_the_one_given(tmp_path):
    pretrain_tower(tmp_path, SMALL)
    report = naming.teach_names(tmp_path, tmp_path, TowerSettings(pictures=12, steps=2, batch_size=4))
    assert set(report["accuracy"]) == {*world()["styles"]["train"], *world()["styles"]["held_out"], "text"}
    model, _ = picture_world_model(start=tmp_path)
    state = model.model.vision_tower.state_dict()
    assert all(torch.equal(state[name].half(), value) for name, value in weights(tmp_path).items())


def test_naming_asks_in_the_tokens_that_users_questions_become():
    model, processor = picture_world_model()
    scene = random_scenes(["flat"], 1, True, random.Random(0))[0]
    prompt = Prompt(text="what is in this picture ?", images=(Picture.from_pil(draw(scene)),))
    encoded = Encoder(processor, config=model.config).prompts([prompt])
    assert encoded.input_ids[0].tolist() == naming._prompt(processor, "what is in this picture ?")


def test_the_shipped_model_names_what_it_sees(tmp_path):
    model, processor = picture_world_model()
    scenes = [
        s for s in random_scenes(world()["styles"]["train"], 120, True, random.Random("check")) if s.style != "text"
    ]
    states = naming._see(model, tower.draw_all(scenes, None, "check"), tower.pixel_scale(processor))
    assert naming._named(model, processor, scenes, states) > 0.9


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="train start"):
        write_picture_world_model(tmp_path / "model", start=tmp_path)
