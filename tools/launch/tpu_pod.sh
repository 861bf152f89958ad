#!/usr/bin/env bash
# Runs one alignvlm command on all workers of a TPU pod slice, or of several slices, as a queued resource of Cloud TPU.
#
#   tools/launch/tpu_pod.sh --name eight --project my-project --zone us-west4-a --accelerator-type v5litepod-256 \
#       --image IMAGE --share 10.0.0.2:/share --spot -- \
#       train --config configs/alignvlm_8b.py --workdir /share/runs/eight --config.data.root=/share/data
#
# It asks for the chips, waits until they are there, and watches. Every worker starts the command by itself when it boots
# (tpu_worker.sh), so nothing depends on this terminal but the restart after a preemption: then the queued resource is
# deleted and asked for again, and the same command goes on from its last checkpoint. When the command has ended, for good
# or ill, the chips are given back. The same call again goes on watching. docs/launch.md has the whole way.
#
# exit codes: 0 the command ended well; 1 Cloud TPU refused the request; 2 the call, or the command, needs you
set -euo pipefail

usage() {
  cat >&2 << 'END'
usage: tpu_pod.sh --name NAME --project PROJECT --zone ZONE --accelerator-type TYPE --image IMAGE --share HOST:/PATH
                  [--runtime-version VERSION] [--num-slices N] [--spot | --reserved] [--service-account ACCOUNT] [--keep]
                  -- ALIGNVLM-COMMAND...

  --name             of the queued resource and of its nodes
  --accelerator-type such as v5litepod-256 (v5e), v5p-128, v6e-64
  --image            a container image with alignvlm (tools/launch/Dockerfile)
  --share            an NFS export that the workers mount as /share, for checkpoints and data
  --runtime-version  of the TPU VM (default: what Google recommends for the type)
  --num-slices       slices of this type, connected by the data centre's network (default: 1)
  --spot             cheaper chips, which may be taken away: then they are asked for again
  --keep             leave the chips running, and paid for, when the command has ended
END
  exit 2
}

say() { printf '%s  %s\n' "$(date -u +%H:%M:%S)" "$*"; }
fail() { printf 'tpu_pod.sh: error: %s\n' "$*" >&2; exit 2; }

name='' project='' zone='' type='' image='' share='' runtime='' slices=1 keep='' service_account='' tier=()
while (($#)); do
  case $1 in
    --name | --project | --zone | --accelerator-type | --image | --share | --runtime-version | --num-slices | --service-account)
      (($# > 1)) || fail "$1 needs a value"
      case $1 in
        --name) name=$2 ;;
        --project) project=$2 ;;
        --zone) zone=$2 ;;
        --accelerator-type) type=$2 ;;
        --image) image=$2 ;;
        --share) share=$2 ;;
        --runtime-version) runtime=$2 ;;
        --num-slices) slices=$2 ;;
        --service-account) service_account=$2 ;;
      esac
      shift 2
      ;;
    --spot | --reserved) tier=("$1"); shift ;;
    --keep) keep=1; shift ;;
    --) shift; break ;;
    -h | --help) usage ;;
    *) fail "unknown option $1 (the alignvlm command comes after --)" ;;
  esac
done
[[ $name && $project && $zone && $type && $image && $share && $# -gt 0 ]] || usage
[[ $share == *:/* ]] || fail "--share: expected HOST:/PATH of an NFS export, got $share"
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--num-slices: expected a whole number above 0, got $slices"
if [[ ! $runtime ]]; then
  case $type in
    v4-*) runtime=tpu-ubuntu2204-base ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) fail "--runtime-version: not known for $type, give it" ;;
  esac
fi
command -v gcloud > /dev/null || fail "gcloud is not on the PATH"

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
place=(--project "$project" --zone "$zone" --quiet)
poll=${ALIGNVLM_POLL_SECONDS:-60}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
printf '%s' "$image" > "$scratch/image"
printf '%s' "$share" > "$scratch/share"
printf '%s' "$name" > "$scratch/name"
printf '%q ' "$@" > "$scratch/command" # quoted, for the workers' shell
if ((slices == 1)); then
  nodes=(--node-id "$name") first_node=$name
else
  nodes=(--node-count "$slices" --node-prefix "$name") first_node=$name-0
fi

# The state of the queued resource, MISSING without one, UNKNOWN if Google does not answer.
state() {
  local answer
  if answer=$(gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format 'value(state.state)' 2>&1); then
    printf '%s' "$answer"
  elif [[ $answer == *NOT_FOUND* ]]; then
    printf MISSING
  else
    printf '%s\n' "$answer" >&2
    printf UNKNOWN
  fi
}

create() {
  gcloud compute tpus queued-resources create "$name" "${place[@]}" \
    --accelerator-type "$type" --runtime-version "$runtime" "${nodes[@]}" \
    ${tier[@]+"${tier[@]}"} ${service_account:+--service-account "$service_account"} \
    --metadata-from-file "startup-script=$here/tpu_worker.sh,alignvlm-image=$scratch/image,alignvlm-share=$scratch/share,alignvlm-name=$scratch/name,alignvlm-command=$scratch/command"
}

delete() { gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force; }

# What the first worker says of the command: nothing yet, running, done or failed.
progress() {
  gcloud compute tpus tpu-vm ssh "$first_node" "${place[@]}" --worker 0 --command 'cat /run/alignvlm/status' 2> /dev/null || true
}

finish() {
  if [[ $keep ]]; then
    say "the chips are kept, and paid for: gcloud compute tpus queued-resources delete $name ${place[*]} --force"
  else
    delete
    say "the chips are given back"
  fi
  exit "$1"
}

last='' held=''
while true; do
  now=$(state)
  [[ $now == "$last" ]] || say "$name: $now"
  case $now in
    MISSING)
      create || { say "Cloud TPU refused the request"; exit 1; }
      ;;
    FAILED | SUSPENDED)
      # A preempted slice is SUSPENDED. A request that failed before it held chips will fail the next time, too.
      if [[ $now == FAILED && ! $held ]]; then
        gcloud compute tpus queued-resources describe "$name" "${place[@]}" >&2 || true
        say "Cloud TPU could not serve the request; when it is clear why: gcloud compute tpus queued-resources delete" \
          "$name ${place[*]} --force"
        exit 1
      fi
      say "the chips were taken away; asking for them again"
      delete
      ;;
    ACTIVE)
      held=1
      said=$(progress)
      case $said in
        done*) say "the command has ended well"; finish 0 ;;
        failed*) say "the command has failed: $said (log: $share, logs/$name)"; finish 2 ;;
      esac
      ;;
  esac
  last=$now
  sleep "$poll"
done
