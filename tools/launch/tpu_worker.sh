#!/usr/bin/env bash
# Startup script of each worker of a TPU pod: mounts the share, if there is one, and runs the alignvlm command in its
# container.
#
# tpu_pod.sh passes this script and its metadata with the queued resource: alignvlm-image, alignvlm-name,
# alignvlm-command (words quoted for the shell), alignvlm-logs and alignvlm-share (one may be absent). The script runs at every boot, also after maintenance. Exit code 2
# of the command means that the user has to fix an error, and ends the script. After any other failure the command is run
# again, and resumes from its last checkpoint: another worker may have died, or the run was preempted or still has another
# writer (exit code 75). The status is in /run/alignvlm/status. The log of each worker is copied to the bucket of
# alignvlm-logs every minute, in NAME/; without a bucket it is on the share, in logs/NAME/.
set -euo pipefail

status_folder=${ALIGNVLM_STATUS_FOLDER:-/run/alignvlm}
share=${ALIGNVLM_SHARE_FOLDER:-/mnt/share}

metadata() {
  curl --silent --fail --retry 5 --header 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/alignvlm-$1"
}

status() {
  mkdir -p "$status_folder"
  printf '%s\n' "$*" > "$status_folder/status"
}

image=$(metadata image)
name=$(metadata name)
words=()
eval "words=($(metadata command))" # The words are quoted by tpu_pod.sh.
logs=$(metadata logs || true)
nfs_export=$(metadata share || true)

status "preparing"
mounts=()
if [[ $nfs_export ]]; then
  mkdir -p "$share"
  if ! mountpoint -q "$share"; then
    if ! command -v mount.nfs > /dev/null; then
      apt-get update -qq
      apt-get install -qq -y -o DPkg::Lock::Timeout=600 nfs-common
    fi
    mount -t nfs -o rw,hard,noatime "$nfs_export" "$share"
  fi
  mounts=(--volume "$share:/share")
fi
if [[ $logs ]]; then
  # The time tells the logs apart that a worker writes before and after a preemption or a reboot.
  log=$status_folder/$(hostname)-$(date -u +%Y%m%d-%H%M%S).log
elif [[ $nfs_export ]]; then
  log=$share/logs/$name/$(hostname).log
else
  status "failed: the metadata names no place for the logs"
  exit 1
fi
mkdir -p "$(dirname "$log")"

# Copies the log to the bucket. A failure must not end the run.
copy_log() {
  [[ ! $logs ]] || gcloud storage cp --quiet "$log" "$logs/$name/" > /dev/null 2>&1 || true
}

# Access to Google's registries is by the service account of the worker.
gcloud auth configure-docker "${image%%/*}" --quiet || true
for attempt in 1 2 3 4 5; do
  docker pull --quiet "$image" && break
  ((attempt < 5)) || { status "failed: $image cannot be pulled"; exit 1; }
  sleep "${ALIGNVLM_RETRY_SECONDS:-20}"
done

if [[ $logs ]]; then
  while sleep "${ALIGNVLM_COPY_SECONDS:-60}"; do copy_log; done > /dev/null 2>&1 &
  trap 'kill $! 2> /dev/null' EXIT
fi
for ((attempt = 1; ; attempt++)); do
  status "running (attempt $attempt)"
  code=0
  # A container needs privileges for the TPU, and the host's network for its metadata. By the name of the job, the
  # command knows that an earlier writer of its workdir was itself, and takes over at once.
  docker run --rm --name alignvlm --privileged --net=host --shm-size=16g --ulimit memlock=-1:-1 \
    --env "ALIGNVLM_JOB=queued resource $name" ${mounts[@]+"${mounts[@]}"} "$image" "${words[@]}" >> "$log" 2>&1 || code=$?
  # The chips may be released as soon as the status says that the command has ended.
  copy_log
  case $code in
    0) status "done"; exit 0 ;;
    2) status "failed: $(tail -n 1 "$log")"; exit 0 ;;
  esac
  printf 'tpu_worker.sh: exit code %s, running the command again\n' "$code" >> "$log"
  docker rm --force alignvlm > /dev/null 2>&1 || true
  sleep "${ALIGNVLM_RETRY_SECONDS:-20}"
done
