"""Model and shards shipped with the project, to try everything without a hub.

scenes       synthetic scenes: coloured shapes on textured backgrounds
vocabulary   the phrases that name them, and a tokenizer for those
model/       a small CLIPSeg checkpoint in the hub's layout; its README has its figures
train        the script that made it
teach        what training shows: batches of scenes and phrases
start        where training starts: sizes, initial weights, optimiser
compose      the last step of training, for pairs never seen
evaluate     the script that measured it
calibrate    the script that measured what chosen thresholds gain
shards/      two small shards of scenes, one tar and one Parquet
make_shards  the script that made those
truth        the script that writes their ground truth
"""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
SHARDS = Path(__file__).parent / "shards"
