"""Names and version of the files in a prepared store."""

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
CATALOG = "catalog.parquet"
USERS = "users.parquet"
OFFSETS = "offsets.npy"
ITEM_IDS = "item_ids.npy"
TIMESTAMPS = "timestamps.npy"
SEQUENCES = "sasrec_format.csv"
ITEM_DOMAINS = "item_domains.csv"
DATA_FILES = (CATALOG, USERS, OFFSETS, ITEM_IDS, TIMESTAMPS)
# What generative-recommenders reads, where it was asked for.
UPSTREAM_FILES = (SEQUENCES, ITEM_DOMAINS)
ALL_FILES = (MANIFEST, *DATA_FILES, *UPSTREAM_FILES)
