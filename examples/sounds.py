"""Recommend by sound: `python examples/sounds.py` (needs `pip install "transrec-hf[media]"`).

The items are sounds of the demo world, without a title or a picture. For your own data write an `items.csv` with the
columns `item_id` and `audio`: paths of WAV, FLAC, OGG, MP3 or M4A files, relative to the folder of `items.csv`.
"""

from __future__ import annotations

from transformers import set_seed

from transrec_hf import Recommender, TransRecModel, TransRecTrainer, TransRecTrainingArguments, leave_one_out
from transrec_hf.data.demo import demo_config, demo_processor, demo_world


def main() -> None:
    set_seed(0)
    platform = demo_world(modalities=["audio"]).target
    # With a pre-trained tower:
    # `TransRecModel.from_text_vision_pretrained(audio_model="MIT/ast-finetuned-audioset-10-10-0.4593")` and
    # `TransRecProcessor.from_towers(audio_model=...)`. Wav2Vec2, HuBERT, WavLM, Whisper and CLAP work too
    model, processor = TransRecModel(demo_config(["audio"])), demo_processor(["audio"])
    args = TransRecTrainingArguments(
        "runs/sounds", num_train_epochs=10, learning_rate=2e-3, tower_learning_rate=2e-3, warmup_steps=20
    )
    split = leave_one_out(platform.sequences)
    trainer = TransRecTrainer(model, args, catalogue=platform.catalogue, split=split, processing_class=processor)
    trainer.train()
    trainer.save_model()
    print(f"ndcg@10 {trainer.report()['metrics']['ndcg@10']:.3f}")

    recommender = Recommender.from_pretrained("runs/sounds", platform.catalogue)
    heard = platform.catalogue.encoded("audio", 0)  # the bytes of a file; it need not be in the catalogue
    titles = dict(zip(platform.catalogue.item_ids, platform.catalogue.items["attributes"], strict=True))
    for item in recommender.recommend([{"audio": heard}], k=5):
        print(f"  {item.item_id}  {item.score:6.3f}  {titles[item.item_id]}")


if __name__ == "__main__":
    main()
