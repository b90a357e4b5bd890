"""The images of the data set `synthetic`, drawn on import.  The runs of a sweep share their memory."""
from data.split import Split
from data.synthetic import generate

TRAIN, TEST = Split(*generate(10_000, seed=1)), Split(*generate(5_000, seed=2))
