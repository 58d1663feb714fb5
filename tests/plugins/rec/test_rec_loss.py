import torch
from torch.nn.functional import cosine_similarity

from hstu_xd.catalog import DomainCatalog
from hstu_xd.plugins.bridge import draw_within
from hstu_xd.plugins.rec.loss import sampled_softmax

CATALOG = DomainCatalog(torch.tensor([0, 0, 1, 1, 2, 0, 1]), ["a", "b", "c"])


def test_draws_stay_in_the_domain_and_reach_all_of_it() -> None:
    domains = torch.tensor([[0, 1], [2, -1]])
    drawn = draw_within(domains, CATALOG, 200)
    assert drawn.shape == (2, 2, 200)
    reached = [[sorted(set(row.tolist())) for row in rows] for rows in drawn]
    assert reached == [[[1, 5], [2, 3, 6]], [[4], [1, 5]]]


def test_loss_is_a_loop_over_targets() -> None:
    hidden, positives, negatives = (torch.randn(n, 8).double() for n in (5, 5, 7))
    negatives[3] = positives[2] * 2  # the positive itself, above any threshold
    excluded = torch.rand(5, 7) < 0.3
    found = sampled_softmax(
        hidden, positives, negatives, scale=torch.tensor(9.0), threshold=0.99, excluded=excluded
    )
    losses = []
    for i in range(5):
        kept = [j for j in range(7) if not excluded[i, j] and not (i == 2 and j == 3)]
        scores = [cosine_similarity(hidden[i], positives[i], dim=0)]
        scores += [cosine_similarity(hidden[i], negatives[j], dim=0) for j in kept]
        losses.append(-(9 * torch.stack(scores)).log_softmax(0)[0])
    torch.testing.assert_close(found["loss"], torch.stack(losses).mean())


def test_own_negatives_equal_shared_ones() -> None:
    hidden, positives, shared = (torch.randn(n, 8) for n in (4, 4, 6))
    settings = {"scale": torch.tensor(5.0), "threshold": 0.99}
    own = shared.expand(4, 6, 8)
    one = sampled_softmax(hidden, positives, shared, **settings)
    other = sampled_softmax(hidden, positives, own, **settings)
    assert set(one) == {"loss", "nce_samples", "nce_top1_acc", "nce_top5_acc"}
    for name in one:
        torch.testing.assert_close(one[name], other[name])
    assert float(one["nce_samples"]) == 7
