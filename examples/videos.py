"""Recommend by moving pictures: `python examples/videos.py` (needs `pip install "transrec-hf[media]"`).

The items are short animations of the demo world and their titles. For your own data write an `items.csv` with the
columns `item_id`, `text` and `video`. The last has paths of MP4, MOV, WEBM, MKV, AVI or animated GIF files, relative
to the folder of `items.csv`.
"""

from __future__ import annotations

from transformers import set_seed

from transrec_hf import Recommender, TransRecModel, TransRecTrainer, TransRecTrainingArguments, leave_one_out
from transrec_hf.data.demo import demo_config, demo_processor, demo_world


def main() -> None:
    set_seed(0)
    modalities = ["text", "video"]
    platform = demo_world(modalities=modalities).target
    # With pre-trained towers: `TransRecModel.from_text_vision_pretrained(text_model=..., video_model=...)`. The video
    # model is any image encoder, which reads frame by frame, or an encoder of clips such as "MCG-NJU/videomae-base"
    model = TransRecModel(demo_config(modalities, window_pooling="attention"))
    args = TransRecTrainingArguments(
        "runs/videos", num_train_epochs=10, learning_rate=2e-3, tower_learning_rate=2e-3, warmup_steps=20
    )
    trainer = TransRecTrainer(
        model,
        args,
        catalogue=platform.catalogue,
        split=leave_one_out(platform.sequences),
        processing_class=demo_processor(modalities),
    )
    trainer.train()
    trainer.save_model()
    for target, scores in trainer.report()["slices"]["target_modality"].items():
        print(f"{target:<12} ndcg@10 {scores['ndcg@10']:.3f}")

    recommender = Recommender.from_pretrained("runs/videos", platform.catalogue)
    seen = platform.catalogue.encoded("video", int(platform.catalogue.has("video").argmax()))
    for item in recommender.recommend([{"video": seen}], k=5):
        print(f"  {item.item_id}  {item.score:6.3f}  {item.text or '[video]'}")


if __name__ == "__main__":
    main()
