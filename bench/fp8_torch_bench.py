"""Times cuBLASLt's block-scaled FP8 product through torch, beside which fp8_linear_bench stands.

Activations in 1x128, weights in 128x128 blocks with one F32 factor each, BF16 out; the dense layers
of one rank of DeepSeek-V3 at tensor-parallel 8. Weights are rotated past the L2.

  python3 bench/fp8_torch_bench.py [tokens ...]
"""

import sys

import torch

SHAPES = {
    "qkv_a": (2112, 7168),
    "q_b": (3072, 1536),
    "o_proj": (7168, 2048),
    "mlp w13": (4608, 7168),
    "mlp w2": (7168, 2304),
}
LAUNCHES = 24


def factors_of_weight(outputs, inputs):
    # [K blocks, N blocks], K contiguous, its rows padded to a multiple of four blocks.
    blocks, padded = inputs // 128, (inputs // 128 + 3) // 4 * 4
    memory = torch.rand((outputs + 127) // 128, padded, device="cuda") + 0.5
    return memory[:, :blocks].t()


def time_us(outputs, inputs, tokens):
    copies = max(1, min(LAUNCHES, 200_000_000 // (outputs * inputs)))
    x = torch.randn(tokens, inputs, device="cuda").to(torch.float8_e4m3fn)
    x_scales = (torch.rand(inputs // 128, tokens, device="cuda") + 0.5).t()
    weights = [torch.randn(outputs, inputs, device="cuda").to(torch.float8_e4m3fn) for _ in range(copies)]
    scales = [factors_of_weight(outputs, inputs) for _ in range(copies)]

    def once(i):
        return torch._scaled_mm(
            x, weights[i % copies].t(), scale_a=x_scales, scale_b=scales[i % copies], out_dtype=torch.bfloat16
        )

    out = once(0)
    wide = lambda s, n, dim: s.repeat_interleave(128, dim)
    expected = (x[:64].double() * wide(x_scales[:64], 128, 1).double()) @ (
        weights[0].double() * wide(wide(scales[0].t(), 128, 1), 128, 0)[:outputs].double()
    ).t()
    error = ((out[:64].double() - expected).norm() / expected.norm()).item()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(LAUNCHES):
            once(i)
    times = []
    for _ in range(8):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[3] * 1e3 / LAUNCHES, error


def main():
    tokens_list = [int(a) for a in sys.argv[1:]] or [64, 256, 512, 2048, 8192]
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    for name, (outputs, inputs) in SHAPES.items():
        for tokens in tokens_list:
            try:
                us, error = time_us(outputs, inputs, tokens)
            except RuntimeError as e:
                print(f"{name:8} {tokens:6}  refused: {str(e)[:150]!r}")
                continue
            tflops = 2e-6 * outputs * inputs * tokens / us
            print(f"{name:8} {tokens:6} {us:9.2f} us {tflops:7.0f} TFLOP/s  error {error:.1e}")


if __name__ == "__main__":
    main()
