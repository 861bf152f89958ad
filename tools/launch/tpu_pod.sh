#!/usr/bin/env bash
# Runs one alignvlm command on all workers of one or several TPU pod slices, as a queued resource of Cloud TPU.
#
#   tools/launch/tpu_pod.sh --name eight --project my-project --zone us-west4-a --accelerator-type v5litepod-256 \
#       --image IMAGE --logs gs://my-bucket/logs --spot -- \
#       train --config configs/alignvlm_8b.py --workdir gs://my-bucket/runs/eight --config.data.root=gs://my-bucket/data
#
# It requests the chips, waits for them, and monitors the command. Each worker starts the command at boot
# (tpu_worker.sh). Only the restart after a preemption depends on this terminal: the queued resource is then deleted and
# requested again, and the command resumes from its last checkpoint. When the command has ended, successfully or not, the
# chips are released. Run the same call again to resume monitoring. docs/launch.md has the details.
#
# Exit codes: 0 the command succeeded; 1 Cloud TPU refused the request; 2 the user has to fix the call or the command
set -euo pipefail

usage() {
  cat >&2 << 'END'
usage: tpu_pod.sh --name NAME --project PROJECT --zone ZONE --accelerator-type TYPE --image IMAGE
                  [--logs gs://BUCKET/PATH] [--share HOST:/PATH] [--runtime-version VERSION] [--num-slices N]
                  [--spot | --reserved] [--service-account ACCOUNT] [--keep] -- ALIGNVLM-COMMAND...

  --name             name of the queued resource and of its nodes
  --accelerator-type accelerator type, such as v5litepod-256 (v5e), v5p-128 or v6e-64
  --image            container image with alignvlm (Dockerfile)
  --logs             folder in a bucket, to which the workers copy their logs every minute
  --share            NFS export that the workers mount as /share, for runs and data that are not in a bucket; without
                     --logs, the logs are in its folder logs/NAME
  --runtime-version  runtime version of the TPU VM (default: Google's recommendation for the type)
  --num-slices       number of slices of this type, connected by the data center network (default: 1)
  --spot             use spot chips, which are cheaper but may be preempted; they are then requested again
  --reserved         use reserved chips
  --service-account  service account of the workers, which reads and writes the bucket
  --keep             keep the chips, and their costs, after the command has ended
END
  exit 2
}

log() { printf '%s  %s\n' "$(date -u +%H:%M:%S)" "$*"; }
fail() { printf 'tpu_pod.sh: error: %s\n' "$*" >&2; exit 2; }

name='' project='' zone='' type='' image='' logs='' share='' runtime='' slices=1 keep='' service_account='' tier=()
while (($#)); do
  case $1 in
    --name | --project | --zone | --accelerator-type | --image | --logs | --share | --runtime-version | --num-slices | --service-account)
      (($# > 1)) || fail "$1 needs a value"
      case $1 in
        --name) name=$2 ;;
        --project) project=$2 ;;
        --zone) zone=$2 ;;
        --accelerator-type) type=$2 ;;
        --image) image=$2 ;;
        --logs) logs=${2%/} ;;
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
[[ $name && $project && $zone && $type && $image && $# -gt 0 ]] || usage
[[ $logs || $share ]] || fail "pass --logs gs://BUCKET/PATH or --share HOST:/PATH; the disks of the workers are deleted with the chips"
[[ ! $logs || $logs == gs://?* ]] || fail "--logs: expected gs://BUCKET/PATH, got $logs"
[[ ! $share || $share == *:/* ]] || fail "--share: expected HOST:/PATH of an NFS export, got $share"
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--num-slices: expected a positive integer, got $slices"
if [[ ! $runtime ]]; then
  case $type in
    v4-*) runtime=tpu-ubuntu2204-base ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) fail "no default --runtime-version for $type; pass it" ;;
  esac
fi
command -v gcloud > /dev/null || fail "gcloud not found on the PATH; install the Google Cloud CLI"

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
place=(--project "$project" --zone "$zone" --quiet)
poll=${ALIGNVLM_POLL_SECONDS:-60}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
printf '%s' "$image" > "$scratch/image"
printf '%s' "$name" > "$scratch/name"
printf '%q ' "$@" > "$scratch/command" # Quoted for the shell of the workers.
metadata="startup-script=$here/tpu_worker.sh,alignvlm-image=$scratch/image,alignvlm-name=$scratch/name,alignvlm-command=$scratch/command"
if [[ $logs ]]; then
  printf '%s' "$logs" > "$scratch/logs"
  metadata+=",alignvlm-logs=$scratch/logs"
fi
if [[ $share ]]; then
  printf '%s' "$share" > "$scratch/share"
  metadata+=",alignvlm-share=$scratch/share"
fi
if ((slices == 1)); then
  nodes=(--node-id "$name") first_node=$name
else
  nodes=(--node-count "$slices" --node-prefix "$name") first_node=$name-0
fi

# Prints the state of the queued resource: MISSING if there is none, UNKNOWN if Cloud TPU does not respond.
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
    --metadata-from-file "$metadata"
}

delete() { gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force; }

# Prints the status of the command on the first worker: running, done, failed, or nothing yet.
progress() {
  gcloud compute tpus tpu-vm ssh "$first_node" "${place[@]}" --worker 0 --command 'cat /run/alignvlm/status' 2> /dev/null || true
}

finish() {
  if [[ $keep ]]; then
    log "the chips are kept and cost money; release them with: gcloud compute tpus queued-resources delete $name ${place[*]} --force"
  else
    delete
    log "the chips are released"
  fi
  exit "$1"
}

last='' held=''
while true; do
  now=$(state)
  [[ $now == "$last" ]] || log "$name: $now"
  case $now in
    MISSING)
      create || { log "Cloud TPU refused the request"; exit 1; }
      ;;
    FAILED | SUSPENDED)
      # A preempted slice is SUSPENDED. A request that failed before it got any chips would fail again.
      if [[ $now == FAILED && ! $held ]]; then
        gcloud compute tpus queued-resources describe "$name" "${place[@]}" >&2 || true
        log "Cloud TPU could not serve the request; fix the cause, then run: gcloud compute tpus queued-resources delete" \
          "$name ${place[*]} --force"
        exit 1
      fi
      log "the chips were preempted; requesting them again"
      delete
      ;;
    ACTIVE)
      held=1
      status=$(progress)
      case $status in
        done*) log "the command succeeded"; finish 0 ;;
        failed*) log "the command failed: $status (log: ${logs:-$share, logs}/$name)"; finish 2 ;;
      esac
      ;;
  esac
  last=$now
  sleep "$poll"
done
