"""The items that targets are ranked among."""


class CandidateIndex:
    def __init__(self, ids, embeddings):
        self.ids, self.embeddings = ids, embeddings
        self.num_objects = ids.shape[1]
