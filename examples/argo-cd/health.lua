-- Argo CD's health of a ModelDeployment or a FineTuneJob (docs/status.md).
local status = obj.status or {}
if status.observedGeneration ~= obj.metadata.generation then
  return {status = "Progressing", message = "The operator has not seen this generation yet."}
end
local found = {}
for _, condition in ipairs(status.conditions or {}) do
  found[condition.type] = condition
end
if found.Stalled and found.Stalled.status == "True" then
  return {status = "Degraded", message = found.Stalled.message}
end
if found.Suspended and found.Suspended.status == "True" then
  return {status = "Suspended", message = found.Suspended.message}
end
local goal = found.Ready or found.Succeeded
if goal and goal.status == "True" then
  return {status = "Healthy", message = goal.message}
end
return {status = "Progressing", message = goal and goal.message or ""}
