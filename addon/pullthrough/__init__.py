"""A pull-through cache for the Ollama registry, living inside mitmproxy.

What runs is owned by one `addon.OllamaCache` instance; importing any module of this package starts nothing.

    L4   addon  flows  messages  gate  parentleg  takeover
         intake  drill  logsetup  modes  opening  idle_addons
         blobserver  incomplete  desk  pages  lookout
         clientpages  cli_ca  cli_setup  cli_tier
         cli  cli_base  cli_models  cli_progress
         cli_transfer  meter                                 edges: mitmproxy, our port, the terminal
    L3c  delivery  blob_connection  passing_on  loopback
         byte_sender  sender  door                           bytes to clients, in threads
    L3b  registry  manifests  grants  exchange  prefetch
         refresh  redirects  offload  signed_addresses
         blobs  blob_content  pings  warm  verbs  metrics  vitals
         watch  statuspage  tierverbs                        request value -> answer: status, headers and what to send
         examining  ollamadaemon                             the ones that look for what is wrong
    L3a  reader                                              hands out the bytes of one interval of one blob
    L2b  recorder  recording  cursor  relay  fetcher
         supply  sealer  counters  keeper  workroom  ahead   the ones that talk to the CDN and keep what it says
         tier  uploader  leaseholder  nearby                 what a fleet of caches shares
         verifying  importing  exporting                     the ones that check the store and carry models in and out
    L2a  store  storefolder  index  contents  ingest  upstream  impostors  datastream  claims  resolver  collapse
         blobfiles  modelfiles  blobtable  proofs  surveying  migration
         ca  threads  places  looplag  platform  dialling  clock
         ledger  control  asking  housekeeping
         copying  inventory  modeltree  bundle  admission
         authorities  clientsetup  objectstore  fallocate
         manifesttable  byte_threads  outlets  tls_outlet
         tls_contexts  readiness  dialer  dataclient         disk, sockets, tasks, threads, keys
    L1   assembly  scheduler  freshness  retention  access
         tunnel  budget  parent  pulls  connlimit
         traffic  catalogue  pruning  diagnosis
         breaker  returns  lease  distrust  patience         state and policy, no I/O; `now` is a parameter
    L0   errors  digest  route  byterange  intervals  datacheck  capability  presigned  cachestatus  records  chunksums
         coding  conditional  boundedjson  fields  refusals
         requestlog  settings  options  addressing  loopguard  wording
         jsonlog  termlog  fleet  gcpause  manifestjson  webpage
"""
