"""The BAGEL model: what arXiv 2505.14683 describes, written to be read, under the official tensor names.

Nothing in here knows notebooks, downloads, progress bars or rented machines.
Read in this order: checks, config, images, layers, decoder, vision, autoencoder, model, context, decoding, flow.
"""
