"""clipseg-ray: CLIPSeg and CLIP over image shards, as a streaming batch pipeline on Ray Data.

The modules in the order of the flow:

    errors       every error the pipeline raises, in one tree
    schema       the columns of every table: the contract with readers
    uri          paths and URIs as users write them, in one form and without credentials
    config, config_classify, config_search, config_status
                 what a job is asked to do, checked before anything starts
    command      the command line of every job, made from its config
    faults, retry, s3, s3_read, s3_write, storage
                 local disk and S3: list, read, write so that nobody sees half a file
    parts        reading the parts of an output's tables
    isolate      a generator run in a process of its own
    shard, read_tar, read_parquet
                 what the unit of work is, and its rows, strictly read
    plan, read   which shards an input has; shards -> records of encoded bytes
    model/       torch alone: CLIP, CLIPSeg, tokenizer, image processor, checkpoints
    convert, prepare
                 encoded bytes -> upright RGB -> uint8 pixels at the model's size
    checkpoint   what a job's model is, as the driver and the actors know it
    pixels, segment, embed, classify
                 pixels -> mask logits, embeddings or labels, on the actors that hold the model
    masks        logits -> mask at the image's size -> RLE, box, area, scores
    receipts, write, added, commit
                 rows -> fragments -> one part per shard and table -> a receipt
    tables       what the model gave -> rows of the output's tables, gathered by shard
    record, resume, account, status
                 what a run was asked to do, what of it is left, and what is done
    progress     what the terminal shows meanwhile
    run          the one module here that knows Ray: share its CPUs, run the stream, add it up
    vectors, read_embeddings, query, search, index, recall, results, duplicates
                 what is done with a finished table of embeddings
    report, gallery
                 finished tables -> a picture, a page
    demo/        the bundled model and shards, and the scripts that made them

A module imports only from modules above it; the jobs import all of them.
"""

__version__ = "0.1.0"
