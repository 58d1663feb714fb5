"""A trainer that looks its parts up in this module each time it runs, as upstream's does."""

import logging
from collections import defaultdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.tensorboard import SummaryWriter

import gin

from ..data.eval import _avg, add_to_summary_writer, eval_metrics_v2_from_tensors, get_eval_state
from ..data.reco_dataset import get_reco_dataset
from ..indexing.utils import get_top_k_module
from ..modeling.sequential import input_features_preprocessors as preprocessors
from ..modeling.sequential.autoregressive_losses import (
    InBatchNegativesSampler,
    LocalNegativesSampler,
)
from ..modeling.sequential.embedding_modules import LocalEmbeddingModule
from ..modeling.sequential.encoder_utils import get_sequential_encoder
from ..modeling.sequential.features import movielens_seq_features_from_row
from ..modeling.sequential.losses.sampled_softmax import SampledSoftmaxLoss
from ..modeling.sequential.output_postprocessors import L2NormEmbeddingPostprocessor
from ..modeling.similarity_utils import get_similarity_function
from .data_loader import create_data_loader


def setup(rank, world_size, master_port):
    address = f"tcp://localhost:{master_port}"
    dist.init_process_group("nccl", init_method=address, rank=rank, world_size=world_size)


@gin.configurable
def train_fn(
    rank, world_size, master_port, dataset_name="ml-20m", max_sequence_length=200,
    local_batch_size=128, eval_batch_size=128, eval_user_max_batch_size=None,
    main_module="SASRec", main_module_bf16=False, dropout_rate=0.2,
    user_embedding_norm="l2_norm", sampling_strategy="in-batch", loss_module="SampledSoftmaxLoss",
    num_negatives=1, item_l2_norm=False, temperature=0.05, num_epochs=101, learning_rate=1e-3,
    num_warmup_steps=0, weight_decay=1e-3, top_k_method="MIPSBruteForceTopK", eval_interval=100,
    item_embedding_dim=240, interaction_module_type="", gr_output_length=10, l2_norm_eps=1e-6,
):  # fmt: skip
    assert (loss_module, user_embedding_norm) == ("SampledSoftmaxLoss", "l2_norm")
    assert (main_module_bf16, eval_user_max_batch_size) == (False, None)
    setup(rank, world_size, master_port)
    device, room, width = rank, gr_output_length + 1, item_embedding_dim
    data = get_reco_dataset(
        dataset_name=dataset_name, max_sequence_length=max_sequence_length, chronological=True
    )
    share = {"world_size": world_size, "rank": rank, "drop_last": world_size > 1, "shuffle": True}
    sampler, train_loader = create_data_loader(data.train_dataset, local_batch_size, **share)
    _, eval_loader = create_data_loader(data.eval_dataset, eval_batch_size, **share)
    similarity, similarity_text = get_similarity_function(interaction_module_type, width, width)
    model = get_sequential_encoder(
        module_type=main_module,
        max_sequence_length=max_sequence_length,
        max_output_length=room,
        embedding_module=LocalEmbeddingModule(data.max_item_id, width),
        interaction_module=similarity,
        input_preproc_module=preprocessors.LearnablePositionalEmbeddingInputFeaturesPreprocessor(
            max_sequence_length + room, width, dropout_rate
        ),
        output_postproc_module=L2NormEmbeddingPostprocessor(width),
        verbose=True,
    )
    loss_of = SampledSoftmaxLoss(num_negatives, temperature, model)
    norm = {"l2_norm": item_l2_norm, "l2_norm_eps": l2_norm_eps}
    if sampling_strategy == "in-batch":
        negatives = InBatchNegativesSampler(**norm, dedup_embeddings=True)
    else:
        table = model._embedding_module._item_emb
        items = {"num_items": data.max_item_id, "all_item_ids": data.all_item_ids}
        negatives = LocalNegativesSampler(**items, item_emb=table, **norm)
    name = f"{model.debug_str()}_{similarity_text}_{negatives.debug_str()}-ddp{world_size}"
    run = f"{dataset_name}-l{max_sequence_length}/{name}"
    negatives = negatives.to(device)
    model = DDP(model.to(device), device_ids=[rank], broadcast_buffers=False)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=weight_decay)
    writer = SummaryWriter(f"exps/{run}") if rank == 0 else None

    def evaluate(batches, *, prefix, number):
        model.eval()
        state = get_eval_state(
            model=model.module,
            all_item_ids=data.all_item_ids,
            negatives_sampler=negatives,
            top_k_module_fn=lambda vectors, ids: get_top_k_module(
                top_k_method, model.module, vectors, ids
            ),
            device=device,
        )
        found = defaultdict(list)
        for features, targets, ratings in batches:
            metrics = eval_metrics_v2_from_tensors(
                state, model.module, features, target_ids=targets, target_ratings=ratings
            )
            for name, values in metrics.items():
                found[name].append(values)
        found = {name: torch.cat(values) for name, values in found.items()}
        add_to_summary_writer(writer, number, found, prefix=prefix, world_size=world_size)
        model.train()
        ndcg, mrr = (_avg(found[name], world_size) for name in ("ndcg@10", "mrr"))
        return f"NDCG@10 {ndcg:.4f}, MRR {mrr:.4f}"

    def batches_of(loader):
        for row in loader:
            yield movielens_seq_features_from_row(row, device=device, max_output_length=room)

    step = 0
    for epoch in range(num_epochs):
        sampler.set_epoch(epoch)
        for features, targets, ratings in batches_of(train_loader):
            if step % eval_interval == 0:
                text = evaluate([(features, targets, ratings)], prefix="eval", number=step)
                logging.info(f"rank {rank}: (eval): iter {step} (epoch {epoch}): {text}")
            # From here on the target is part of the history, and there to be predicted.
            history = features.past_ids.scatter_(1, features.past_lengths.unsqueeze(1), targets)
            vectors = model.module.get_item_embeddings(history)
            encoded = model(**features._asdict() | {"past_embeddings": vectors})
            flat = history.flatten()
            negatives.process_batch(flat, flat != 0, vectors.flatten(0, 1))
            loss, _ = loss_of(
                features.past_lengths, encoded[:, :-1], history[:, 1:], vectors[:, 1:],
                (history[:, 1:] != 0).float(), negatives, **features.past_payloads,
            )  # fmt: skip
            warm = min(1.0, (step + 1) / max(1, num_warmup_steps))
            optimizer.param_groups[0]["lr"] = warm * learning_rate
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if writer is not None:
                writer.add_scalar("losses/ar_loss", loss, step)
            step += 1
        text = evaluate(batches_of(eval_loader), prefix="eval_epoch", number=epoch)
        logging.info(f"rank {rank}: eval @ epoch {epoch} (stand-in): {text}")
    if writer is not None:
        writer.close()
        checkpoint = Path(f"ckpts/{run}_ep{epoch}")
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model_state_dict": model.state_dict()}, checkpoint)
    dist.destroy_process_group()
