"""The models in torch alone: checkpoint folders, towers, decoder.

A module imports only from modules above it:

    fetch       a folder, a hub id or an s3:// URI -> a local checkpoint folder
    config      what config.json says, as dataclasses
    weights     tensors of the folder -> a module, strictly
    check       config.json held against the tensors, before anything is built
    resize      the centre of an image at another size, in bounded memory
    preprocess  images -> pixels at the model's size
    tokenizer   texts -> token ids
    clip        the two towers, and CLIP
    encoders    one half of CLIP alone, and CLIP's image classifier
    clipseg     the decoder, and CLIPSeg
"""
