"""LLaVA's own scripts, and the published interventions', run with another entry point and nothing else
changed.
"""

from __future__ import annotations

import json

import pytest

from tests.support.trainings import GOLDEN, result, rows, run

pytestmark = pytest.mark.slow

PRETRAIN = """
    --deepspeed ./scripts/zero2.json --model_name_or_path llm --version plain --data_path
    train/stage1.json --image_folder images --vision_tower clip_g4 --mm_projector_type mlp2x_gelu
    --normalize_projector True --use_multilayer_features True --tune_mm_mlp_adapter True
    --mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False --bf16 True
    --output_dir {out}/pretrain --num_train_epochs 1 --per_device_train_batch_size 8
    --per_device_eval_batch_size 4 --gradient_accumulation_steps 1 --evaluation_strategy no
    --save_strategy steps --save_steps 24000 --save_total_limit 1 --learning_rate 1e-3 --weight_decay 0.
    --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 --tf32 True --model_max_length 2048
    --gradient_checkpointing True --dataloader_num_workers 4 --lazy_preprocess True --report_to wandb
"""
FINETUNE = """
    --deepspeed ./scripts/zero3.json --model_name_or_path llm --version v1 --data_path train/stage2.json
    --image_folder images --vision_tower clip_g4 --pretrain_mm_mlp_adapter
    {out}/pretrain/mm_projector.bin --normalize_projector True --use_multilayer_features True
    --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --mm_use_im_start_end False
    --mm_use_im_patch_token False --image_aspect_ratio pad --group_by_modality_length True --bf16 True
    --output_dir {out}/finetune --num_train_epochs 1 --per_device_train_batch_size 8
    --per_device_eval_batch_size 4 --gradient_accumulation_steps 1 --evaluation_strategy no
    --save_strategy steps --save_steps 50000 --save_total_limit 1 --learning_rate 2e-5 --weight_decay 0.
    --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 --tf32 True --model_max_length 2048
    --gradient_checkpointing True --dataloader_num_workers 4 --lazy_preprocess True --report_to wandb
"""


def test_both_stages_with_their_deepspeed_files(tmp_path):
    for name, script in (("pretrain", PRETRAIN), ("finetune", FINETUNE)):
        text = run(script.format(out=tmp_path).split(), tmp_path / "log")
        assert "does not exist; using zero" in text
        assert result(tmp_path / name)["status"] == "finished"
        assert len(rows(tmp_path / name)) == 10 and rows(tmp_path / name)[-1]["loss"] < 9
    config = json.loads((tmp_path / "finetune" / "config.json").read_text())
    assert config["normalize_projector"] and config["use_multilayer_features"]
    assert config["dtype"] == "bfloat16"
    assert not (GOLDEN / "scripts").exists()
