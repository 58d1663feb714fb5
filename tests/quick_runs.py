"""A model and a training so small that a test can afford several."""

QUICK = (
    "xd_encoder.num_heads = 2",
    "xd_encoder.dqk = 4",
    "xd_encoder.dv = 4",
    "xd_train.item_embedding_dim = 8",
    "xd_train.num_epochs = 1",
    "xd_train.num_negatives = 20",
)
# One layer, and the latest eight events.
QUICKEST = (*QUICK, "xd_encoder.num_blocks = 1", "xd_train.max_sequence_length = 8")
