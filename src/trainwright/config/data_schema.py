"""The config's `data` and `batch` sections. As in schema.py, nothing here imports torch."""

from __future__ import annotations

from pydantic import Field

from trainwright.config.section import Count, Section


class MixEntry(Section):
    """A token data set of a mix."""

    path: str = Field(description="Folder of the token data set, or its URL.")
    weight: float | None = Field(None, gt=0, description="Share of the samples, over the sum of all; default its size.")


class DataConfig(Section):
    """The token data set, as `trainwright prepare` wrote it, and how sequences are cut from it."""

    path: str | None = Field(None, description="Folder of the token data set, or its URL, such as `s3://bucket/plays`.")
    cache: str | None = Field(
        None,
        description="Where data sets from URLs are kept on each machine; default $TRAINWRIGHT_CACHE or ~/.cache/trainwright.",
    )
    mix: tuple[MixEntry, ...] = Field((), description="Several data sets of one tokenizer instead, with weights.")
    sequence_length: Count = Field(1024, gt=0, description="Tokens a sequence, T.")
    workers: Count = Field(1, ge=0, description="Batches prefetched in the background; 0 reads in the loop.")
    shuffle: bool = Field(True, description="Visit the sequences in a permuted order, another one each epoch.")
    document_mask: bool = Field(
        False, description="Attention stays inside each document of a packed sequence, instead of crossing their ends."
    )
    allow_change: bool = Field(
        False, description="Resume although the data set's version is not the checkpoint's; the order then changes."
    )


class BatchConfig(Section):
    """The batch: any two of a global size, `micro_size` and `accumulation`; or one of the sizes alone."""

    global_size: Count | None = Field(None, gt=0, description="Sequences an optimizer step, over all ranks.")
    global_tokens: Count | None = Field(
        None, gt=0, description="The same in tokens; a multiple of data.sequence_length."
    )
    micro_size: Count | None = Field(None, gt=0, description="Sequences a forward pass, per replica.")
    accumulation: Count | None = Field(None, gt=0, description="Micro-batches an optimizer step.")
