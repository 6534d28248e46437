"""clipseg-ray: CLIPSeg and CLIP over image shards, as a streaming batch pipeline on Ray Data.

The modules in the order of the flow:

    config    what a job is asked to do, checked before anything starts
    schema    the columns of every table: the contract with readers
    errors    every error the pipeline raises, in one tree
    storage   local disk and S3: list, read, write once
    read      the plan of shards; tar, Parquet and folders -> records of encoded bytes
    prepare   encoded bytes -> upright RGB -> uint8 pixels at the model's size
    model/    torch alone: CLIP, CLIPSeg, tokenizer, image processor, checkpoints
    segment   pixels x prompts -> logits, on the actors that hold the model
    masks     logits -> mask at the image's size -> RLE, box, area, scores
    write     rows -> fragments -> one part per shard and table -> receipt
    run       the one module here that knows Ray: start it, share its CPUs, keep the account
    progress  what the terminal shows meanwhile
    report    finished tables -> a picture
    demo/     the bundled model and shards, and the scripts that made them

A module imports only from modules above it; the jobs import all of them.
"""

__version__ = "0.1.0"
