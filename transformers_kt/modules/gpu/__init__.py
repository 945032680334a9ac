"""Operations on a GPU: each takes and gives tensors of the host, as every module does.

Between two modules activations lie in ordinary memory: a module may stand beside any other, under any hook. What saves
the trips is `modules.fused.hybrid_model`, where layers hand them on inside the device.
"""
