#!/bin/sh
# Build the projects that benchmarks.serving and benchmarks.compression compare with, each in an
# environment of its own under .bench/. torch is pinned first, so that no engine chooses another; which build comes is pip's
# configuration (see README.md). vLLM's environment is the one of `make test-vllm`.
set -eu
PYTHON=${PYTHON:-python3}
cd "$(dirname "$0")/../.."
mkdir -p .bench

environment() { # name, packages...
  name=$1; shift
  if [ -e ".bench/$name/.ready" ]; then return; fi
  echo "building .bench/$name: $*"
  "$PYTHON" -m venv ".bench/$name"
  ".bench/$name/bin/pip" install --quiet "$@"
}

environment llama_cpp llama-cpp-python==0.3.36 gguf==0.19.0 numpy
touch .bench/llama_cpp/.ready

environment openvino torch==2.13.0 openvino-genai==2026.4.1.0 "optimum-intel[openvino]==2.2.0"
# A torchvision built for CUDA does not load beside a CPU build of torch, and is not needed.
.bench/openvino/bin/pip uninstall --quiet --yes torchvision
touch .bench/openvino/.ready

environment transformers torch==2.13.0 transformers==5.19.0
touch .bench/transformers/.ready

# Compresses; transformers and compressed-tensors come with it, and read what both projects write.
environment llmcompressor torch==2.13.0 llmcompressor==0.14.0.1
touch .bench/llmcompressor/.ready
